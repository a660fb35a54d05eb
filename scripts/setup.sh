#!/bin/sh
# sh scripts/setup.sh notebooks|dev|site
#
# Makes .venv and installs spgdd with that set of extras from pyproject.toml (minutes the first time, under a
# second when nothing changed). Called by the Makefile; needs Python 3.11, 3.12 or 3.13.
set -eu
cd "$(dirname "$0")/.."
extras=$1
python=.venv/bin/python

say() { printf '%s\n' "$*" >&2; }
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

if ! supported "$python"; then
    for candidate in python3 python3.12 python3.11 python3.13 python; do
        if supported "$candidate"; then found=$candidate; break; fi
    done
    if [ -z "${found:-}" ]; then
        say "spgdd needs Python 3.11, 3.12 or 3.13, and none was found on PATH." \
            "Install one (python.org, conda, pyenv or your system's packages) and run this again."
        exit 1
    fi
    if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
        say "$found has no venv module, so .venv cannot be made." \
            "On Debian and Ubuntu: apt-get install python3-venv, then run this again."
        exit 1
    fi
    say "Making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
fi

# Installed already? Only if neither the requirements nor the place of this folder changed since (dev and site have notebooks).
key="$(cksum <pyproject.toml) $PWD"
installed() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$key" ]; }
if [ "$extras" = notebooks ] && { installed dev || installed site; }; then exit 0; fi
if ! installed "$extras"; then
    say "Installing spgdd with its $extras requirements into .venv (minutes, the first time)"
    if ! "$python" -m pip install --disable-pip-version-check --editable ".[$extras]"; then
        say "The installation stopped; pip's own words are above. Without a network, or behind a proxy," \
            "set what pip needs (HTTPS_PROXY, PIP_INDEX_URL, PIP_FIND_LINKS) and run this again."
        exit 1
    fi
    printf '%s' "$key" >".venv/installed-$extras"
fi
