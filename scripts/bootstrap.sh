#!/usr/bin/env bash
# Sets up everything to run RAMster from this checkout: system packages, .venv, native extensions.
# Idempotent: a second run with nothing changed ends at once. `make` calls it before every target.
#
#   scripts/bootstrap.sh            PYTHON=/path/to/python3 picks the interpreter of a new .venv
#   scripts/bootstrap.sh --tests    as root on Debian, also the programs of others that tests use
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.built                    # newer than every source that it was built from
deps_stamp=$venv/.dependencies        # newer than the releases that it was installed from (scripts/lock.sh)
locked=scripts/locked
log=build/bootstrap.log

say() { printf 'ramster: %s\n' "$*"; }
die() { printf 'ramster: %s\n' "$*" >&2; exit 1; }

# quiet TEXT COMMAND...: one progress line; the output only when the command fails.
quiet() {
    say "$1 ..."
    shift
    "$@" >"$log" 2>&1 || { cat "$log" >&2; die "failed: $*"; }
}

usable_python() {
    "$1" - <<'PY' >/dev/null 2>&1
import ensurepip, os, sys, sysconfig, venv
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not (sys.version_info >= (3, 11) and os.path.exists(header)))
PY
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 /usr/bin/python3 python3.13 python3.12 python3.11}; do
        if usable_python "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

has_header() { echo "#include <$1>" | cc -E -x c - >/dev/null 2>&1; }

# The Debian packages whose content is not there. Asks for what is needed, not for package names, so that a
# library or Python of one's own counts.
missing_packages() {
    if ! command -v cc >/dev/null || ! has_header stdio.h; then printf '%s\n' gcc libc6-dev; fi
    command -v make >/dev/null || echo make
    command -v pkg-config >/dev/null || echo pkg-config
    find_python >/dev/null || printf '%s\n' python3-dev python3-venv
    has_header lz4.h || echo liblz4-dev
    has_header zstd.h || echo libzstd-dev
    has_header isa-l.h || echo libisal-dev
    has_header openssl/ssl.h || echo libssl-dev
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        {
            echo "ramster: these packages (by their Debian names) are missing:"
            printf '    %s\n' "${missing[@]}"
            if command -v apt-get >/dev/null; then
                echo "Install them as root, then run the same command again:"
                echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
            else
                echo "Install your distribution's equivalents, then run the same command again."
            fi
        } >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    quiet "reading Debian's package lists" apt-get update
    quiet "installing ${missing[*]}" apt-get install -y --no-install-recommends "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || die "still missing after installation: ${missing[*]}"
}

has_program() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }

# Programs that tests use and the product does not need: where one is missing, its tests are skipped and say so.
missing_test_packages() {
    has_program nbdkit || echo nbdkit
    has_program nbdinfo || echo libnbd-bin
    has_program nbdfuse || echo nbdfuse
    /usr/bin/python3 -c 'import nbd' 2>/dev/null || echo python3-libnbd
    has_program qemu-img || echo qemu-utils
    [ "$(uname -m)" != x86_64 ] || has_program qemu-system-x86_64 || echo qemu-system-x86
    has_program fio || echo fio
    has_program nbd-client || echo nbd-client
    has_program fusermount3 || echo fuse3
}

# Never fails: without network, or on a Debian that lacks one of them, the other tests run all the same.
install_test_packages() {
    local missing package
    mapfile -t missing < <(missing_test_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing programs for tests: ${missing[*]} ..."
        {
            apt-get update || true
            # One by one: a package that is not to be had must not keep the others away.
            for package in "${missing[@]}"; do
                DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" || true
            done
        } >"$log" 2>&1
        mapfile -t missing < <(missing_test_packages)
        [ ${#missing[@]} -gt 0 ] || return 0
    fi
    say "tests that need these packages will be skipped: ${missing[*]}"
}

version_at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# cmake and ninja come as wheels where the system has none, or one that is too old.
build_tools() {
    local have
    have=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p') || true
    if [ -z "$have" ] || ! version_at_least 3.25 "$have"; then echo "-r $locked/cmake.txt"; fi
    command -v ninja >/dev/null || echo "-r $locked/ninja.txt"
}

# Native sources alone: Python files are read from the checkout.
changed_since() {
    [ -e "$1" ] || return 0
    [ -n "$(find CMakeLists.txt pyproject.toml scripts/bootstrap.sh $locked src \
        \( -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]' -o -name CMakeLists.txt -o -name pyproject.toml \
           -o -name bootstrap.sh -o -path "$locked/*" \) -newer "$1" -print -quit)" ]
}

venv_works() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

mkdir -p build
exec 9>build/bootstrap.lock
flock 9                               # two makes at once must not build into one tree

if [ "${1:-}" = --tests ]; then install_test_packages; fi
if [ -e "$stamp" ] && ! changed_since "$stamp" && venv_works; then exit 0; fi

install_packages
if ! venv_works; then
    python=$(find_python) || die "no Python >= 3.11 with headers and the venv module"
    rm -rf "$venv"
    quiet "creating $venv with $("$python" --version)" "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check --no-input)
started=$(mktemp build/started.XXXXXX)
trap 'rm -f "$started"' EXIT
if [ ! -e "$deps_stamp" ] || [ pyproject.toml -nt "$deps_stamp" ] || [ -n "$(find $locked -newer "$deps_stamp")" ]; then
    # Each file that comes from elsewhere is one that was seen before: its hash is in the lists.
    # shellcheck disable=SC2046
    quiet "installing what $locked names into $venv" \
        "${pip[@]}" install --require-hashes -r $locked/requirements.txt $(build_tools)
    quiet "building the native extensions and installing ramster (a minute or two the first time)" \
        "${pip[@]}" install --no-build-isolation --no-deps --editable .
    touch -r "$started" "$deps_stamp"
else
    quiet "rebuilding the native extensions" "${pip[@]}" install --no-build-isolation --no-deps --editable .
fi
# Dated from before the build: what was edited meanwhile is built next time.
touch -r "$started" "$stamp"
say "ready"
