#!/bin/sh
# sh scripts/install_chromium.sh
#
# The browser for tests that look at pages. Installs Debian's or Ubuntu's package where it may; where it may not,
# says so and succeeds: those tests are then skipped.
set -u
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
as_root=""
if [ "$(id -u)" != 0 ]; then as_root="sudo -n"; fi
if command -v apt-get >/dev/null && $as_root true 2>/dev/null; then
    echo "Installing Chromium for the browser tests"
    $as_root apt-get update -q && $as_root apt-get install -q -y --no-install-recommends chromium && exit 0
fi
echo "No Chromium on this machine and no way to install it here: browser tests are skipped." >&2
