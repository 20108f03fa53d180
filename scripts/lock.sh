#!/usr/bin/env bash
# Writes scripts/locked anew: what .venv gets, each release with the hashes of its files, for every platform that it
# has files for. Reads pyproject.toml. Needs the package index; takes a minute. Look at the difference before you commit it.
#
#   scripts/lock.sh                            what pyproject.toml asks for in addition or anew
#   scripts/lock.sh --upgrade                  the newest releases that fit
#   scripts/lock.sh --upgrade-package NAME     of one
#
# Made with the oldest Python that we support: what only that one needs does the others no harm.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
mkdir -p scripts/locked
[ ! -e scripts/locked/requirements.txt ] || cat scripts/locked/*.txt >"$tools/all.txt"    # what is there stays unless asked
python=${PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "ramster: $python is not Python 3.11; set PYTHON" >&2; exit 1; }
"$python" -m venv "$tools"
"$tools/bin/python" -m pip --quiet --disable-pip-version-check install --upgrade pip pip-tools
"$tools/bin/python" -c '
import tomllib
print("cmake>=3.25", "ninja", *tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' >"$tools/build.in"
"$tools/bin/pip-compile" --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --extra dev "$@" \
    --output-file "$tools/all.txt" pyproject.toml "$tools/build.in"
# A release is a line and those that it continues on. cmake and ninja are for systems that have none, or too old ones.
for each in requirements cmake ninja; do
    {
        echo "# Written by scripts/lock.sh; scripts/bootstrap.sh installs what stands here and nothing else."
        awk -v wanted="$each" '/^[a-z]/ { name = $1; sub(/==.*/, "", name) }
            /^#/ { next }
            (name == "cmake" || name == "ninja" ? name : "requirements") == wanted' "$tools/all.txt"
    } >"scripts/locked/$each.txt"
done
echo "ramster: scripts/locked is written"
