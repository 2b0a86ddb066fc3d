#!/usr/bin/env bash
# Install what tests use besides .venv out of Debian's packages: chromium, for the tests marked `browser`, and promtool, for
# those of alert rules. Of the package prometheus only promtool is unpacked: nothing is to be started.
#
#     infra/system_packages.sh
#
# Needs root and apt-get; without them it says so, and those tests are skipped with the reason.
set -euo pipefail

command -v chromium > /dev/null && command -v promtool > /dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "chromium or promtool is missing and cannot be installed here; their tests will be skipped"
    exit 0
fi
if ! apt-get update -qq; then
    echo "apt-get update failed; tests with chromium or promtool will be skipped"
    exit 0
fi
if ! command -v chromium > /dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null &&
        chromium --version || echo "apt-get could not install chromium; tests of pages in a browser will be skipped"
fi
if ! command -v promtool > /dev/null; then
    folder=$(mktemp -d)
    { (cd "$folder" && apt-get download -qq prometheus 2> /dev/null && dpkg-deb -x prometheus_*.deb .) &&
        install -m 755 "$folder/usr/bin/promtool" /usr/local/bin/promtool &&
        promtool --version | head -n 1; } || echo "promtool could not be installed; tests of alert rules will be skipped"
    rm -rf "$folder"
fi
