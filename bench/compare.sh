#!/usr/bin/env bash
# Builds an older commit beside this checkout and runs the benchmarks of both in turns.
#
# bench/compare.sh COMMIT [--rounds N] [--full] [--markdown] [MODULE ...]     (default: 5 rounds of store fault remote nbd)
#
# The older commit is unpacked and built in build/compare/<commit>, with its own .venv, and stays there for the next
# time. Each round runs both, the older one first in odd rounds. What is compared, and how: bench/compare.py.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }
case "${1:-}" in
    '') usage >&2; exit 2 ;;
    -h | --help) usage; exit 0 ;;
esac
commit=$(git rev-parse --verify --quiet "$1^{commit}") || { echo "compare: there is no commit $1" >&2; exit 2; }
shift
older=build/compare/${commit:0:12}
if [ ! -e "$older/.unpacked" ]; then
    rm -rf "$older"
    mkdir -p "$older"
    git archive "$commit" | tar -x -C "$older"
    touch "$older/.unpacked"
fi
scripts/bootstrap.sh
"$older/scripts/bootstrap.sh"
exec .venv/bin/python bench/compare.py "$older" "$@"
