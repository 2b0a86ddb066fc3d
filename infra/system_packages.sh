#!/usr/bin/env bash
# Install the Debian packages that tests use besides .venv: chromium, for the tests marked `browser`.
#
#     infra/system_packages.sh
#
# Needs root and apt-get; without them it says so, and those tests are skipped with the reason.
set -euo pipefail

command -v chromium > /dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "chromium is missing and cannot be installed here; tests of pages in a browser will be skipped"
    exit 0
fi
if ! { apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; }; then
    echo "apt-get could not install chromium; tests of pages in a browser will be skipped"
    exit 0
fi
chromium --version
