#!/usr/bin/env bash
# Fuzzes the NBD parser under AddressSanitizer and UBSan: the native transmission phase, then the handshake.
# docs/fuzzing.md tells what is fuzzed and how. Inputs that fail are kept in build/fuzz/; one of them ends the run.
#
#   scripts/fuzz.sh [SECONDS]         60 seconds by default, four fifths of them for the transmission phase
#   scripts/fuzz.sh replay TARGET FILE...        what the fuzzer found, once more (TARGET: transmission or handshake)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/build/fuzz
target=$out/site
packages=$out/packages                # atheris: a fuzzer alone needs it

say() { printf 'fuzz: %s\n' "$*"; }
die() { printf 'fuzz: %s\n' "$*" >&2; exit 1; }

# The first clang there is; Debian has them with and without a number.
find_clang() {
    local candidate
    for candidate in ${CLANG:-clang clang-19 clang-18 clang-17 clang-16 clang-15 clang-14}; do
        if command -v "$candidate"; then return; fi
    done
    return 1
}

# Can it instrument, and is its part of the sanitizers there?
clang_works() { "$(find_clang)" -shared -fPIC -fsanitize=address,undefined,fuzzer-no-link -x c /dev/null -o /dev/null 2>/dev/null; }

missing_packages() {
    if ! find_clang >/dev/null; then
        echo clang
    elif ! clang_works; then
        echo "libclang-rt-$("$(find_clang)" -dumpversion | cut -d. -f1)-dev"
    fi
    # Names functions and lines in reports.
    [ -n "$(compgen -c llvm-symbolizer)" ] || echo llvm
}

install_packages() {
    local missing round
    export DEBIAN_FRONTEND=noninteractive
    for round in 1 2 3; do            # which run-time library is needed is known once clang is there
        mapfile -t missing < <(missing_packages)
        [ ${#missing[@]} -gt 0 ] || return 0
        [ "$round" != 3 ] || break
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            break
        fi
        say "installing ${missing[*]} ..."
        { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$out/install.log" 2>&1 ||
            { cat "$out/install.log" >&2; die "installation failed"; }
    done
    die "these packages (by their Debian names) are missing: ${missing[*]}. Install them as root, then run this again."
}

pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

build() {
    if [ ! -d "$packages/atheris" ]; then
        say "installing atheris into ${packages#"$PWD/"} ..."
        pip install --quiet --no-deps --target "$packages" 'atheris>=3' >"$out/install.log" 2>&1 ||
            { cat "$out/install.log" >&2; die "atheris cannot be installed"; }
    fi
    say "building into ${out#"$PWD/"} with $(clang_version) ..."
    pip install --quiet --no-build-isolation --no-deps --upgrade --target "$target" \
        --config-settings build-dir="$out/cmake" --config-settings cmake.define.RAMSTER_SANITIZE=fuzz \
        --config-settings cmake.define.CMAKE_C_COMPILER="$(find_clang)" . \
        >"$out/build.log" 2>&1 || { cat "$out/build.log" >&2; die "the build failed"; }
}

clang_version() { "$(find_clang)" --version | head -n 1; }

# fuzzer TARGET ARGUMENTS...: the output goes to a log as well.
fuzzer() {
    local python site preload
    # As in asan.sh: the interpreter below .venv, with the folders as plain PYTHONPATH.
    python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
    # The sanitizers and libFuzzer must be the first library of the process. libFuzzer looks for a mutator of one's own
    # when it is loaded, so that atheris' side of it must be there by then, for the target that has one.
    preload=$packages/asan_with_fuzzer.so
    [ "$1" != transmission ] || preload+=:$(echo "$packages"/atheris/custom_mutator.*.so)
    # detect_leaks, handle_*, PYTHONMALLOC: see asan.sh.
    env LD_PRELOAD="$preload" PYTHONPATH="$PWD:$target:$packages:$site" PYTHONNOUSERSITE=1 PYTHONMALLOC=malloc \
        ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:handle_sigbus=0 UBSAN_OPTIONS=print_stacktrace=1 \
        "$python" -S -m tests.fuzz.target "$@" >"$out/$1.log" 2>&1
}

# fuzz TARGET SECONDS LENGTH
fuzz() {
    local status=0
    mkdir -p "$out/corpus/$1"
    say "$1 for $2 s ..."
    # -timeout: a connection that hangs fails by itself after 20 s, and an instrumented one is slow.
    fuzzer "$1" -max_total_time="$2" -max_len="$3" -timeout=60 -artifact_prefix="$out/$1-" -print_final_stats=1 \
        "$out/corpus/$1" "$out/seeds/$1" "tests/fuzz/corpus/$1" || status=$?
    if [ "$status" != 0 ]; then
        sed -n '/^INFO\|^#/!p' "$out/$1.log" | head -n 120 >&2
        say "$1: FAILED (status $status); the whole log is ${out#"$PWD/"}/$1.log, inputs:" >&2
        find "$out" -maxdepth 1 -name "$1-*" >&2
        return 1
    fi
    say "$1: $(report "$out/$1.log")"
}

# Of lines like "#4569 DONE cov: 513 ft: 1408 corp: 129/45Kb lim: 8030 exec/s: 175 rss: 421Mb".
report() {
    sed -n 's/^#[0-9]*\tINITED cov: \([0-9]*\) .*corp: \([0-9]*\)\/.*/at first \1 edges of \2 inputs,/p' "$1" | tr '\n' ' '
    sed -n 's/^#\([0-9]*\)\tDONE   cov: \([0-9]*\) ft: \([0-9]*\) corp: \([0-9]*\)\/\([^ ]*\).*/after \1 executions \2 edges (\3 features) of \4 inputs (\5)/p' "$1"
}

mkdir -p "$out"
install_packages
build
rm -rf "$out/seeds"
.venv/bin/python -m tests.fuzz.seeds "$out/seeds"
if [ "${1:-}" = replay ]; then
    status=0
    fuzzer "${@:2}" || status=$?
    cat "$out/$2.log"
    exit "$status"
fi
seconds=${1:-60}
status=0
fuzz transmission $((seconds * 4 / 5)) 8192 || status=1
fuzz handshake $(((seconds + 4) / 5)) 4096 || status=1
exit "$status"
