#!/usr/bin/env bash
# A larger dataset of real photographs for the small encoder pair: scripts/photo_set.sh DST.
# Installs into ./.venv, downloads 864 MB of Debian packages, and encodes crops of the thousand photographs in them.
# Run again, it continues where it was interrupted.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
if [ $# != 1 ]; then
    echo "usage: scripts/photo_set.sh DST" >&2
    exit 2
fi
dst=$(realpath -m "$1")
cd "$project"
prepare_environment demo
if may_install && [ ! -e "$dst/photographs.json" ]; then
    apt-get update -qq || echo "could not refresh the lists of packages; trying with those that are there" >&2
fi
blip3o-ds data photographs "$dst"
