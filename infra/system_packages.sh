#!/usr/bin/env bash
# Install what tests use besides .venv out of Debian's packages: chromium, for the tests marked `browser`, Postgres, for
# those of MLflow on it, and promtool, for those of alert rules. Of the package prometheus only promtool is unpacked: nothing is to be started.
#
#     infra/system_packages.sh
#
# Needs root and apt-get; without them it says so, and those tests are skipped with the reason.
set -euo pipefail

has_postgres() { command -v initdb > /dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' > /dev/null; }

command -v chromium > /dev/null && command -v promtool > /dev/null && has_postgres && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "chromium, promtool or Postgres is missing and cannot be installed here; their tests will be skipped"
    exit 0
fi
if ! apt-get update -qq; then
    echo "apt-get update failed; tests with chromium, promtool or Postgres will be skipped"
    exit 0
fi
if ! command -v chromium > /dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null &&
        chromium --version || echo "apt-get could not install chromium; tests of pages in a browser will be skipped"
fi
if ! has_postgres; then
    # Tests start servers of their own; Debian's would be one more.
    mkdir -p /etc/postgresql-common
    [ -e /etc/postgresql-common/createcluster.conf ] ||
        echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql > /dev/null ||
        echo "apt-get could not install Postgres; tests of MLflow on it will be skipped"
fi
if ! command -v promtool > /dev/null; then
    folder=$(mktemp -d)
    { (cd "$folder" && apt-get download -qq prometheus 2> /dev/null && dpkg-deb -x prometheus_*.deb .) &&
        install -m 755 "$folder/usr/bin/promtool" /usr/local/bin/promtool &&
        promtool --version | head -n 1; } || echo "promtool could not be installed; tests of alert rules will be skipped"
    rm -rf "$folder"
fi
