#!/usr/bin/env bash
# Builds the extensions with AddressSanitizer and UBSan into build/asan and runs the native tests on them.
# Arguments go to pytest (default: the store, the links, the wire and the regions).
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/asan
target=$out/site

mkdir -p "$out"
echo "asan: building into $out ..."
.venv/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-build-isolation --no-deps \
    --upgrade --target "$target" --config-settings build-dir="$out/cmake" \
    --config-settings cmake.define.RAMSTER_SANITIZE=address . \
    >"$out/build.log" 2>&1 || { cat "$out/build.log" >&2; exit 1; }

# The interpreter below .venv, with the two folders as plain PYTHONPATH: .venv's editable hook, which would lead to
# the uninstrumented build, is a .pth file and PYTHONPATH reads none.
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
export PYTHONPATH=$PWD/$target:$packages PYTHONNOUSERSITE=1
# libasan must be the first library of the process, and the interpreter is not linked with it.
LD_PRELOAD=$(cc -print-file-name=libasan.so)
# detect_leaks=0: CPython and numpy keep interned objects until exit on purpose; the tests count our own arenas,
# threads and descriptors instead. PYTHONMALLOC=malloc: pymalloc's arenas would hide overruns inside them.
export LD_PRELOAD PYTHONMALLOC=malloc
# handle_sigbus=0, handle_segv=0: a lost page is SIGBUS and a fork's touch SIGSEGV by design, and tests look for them.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:strict_string_checks=1:handle_sigbus=0:handle_segv=0
export UBSAN_OPTIONS=print_stacktrace=1
[ $# -gt 0 ] || set -- tests/native tests/links tests/wire tests/frontswap
# -S: none of that interpreter's own packages. --capture=sys: a sanitizer writes its report to descriptor 2.
"$python" -S -m pytest --capture=sys "$@"
