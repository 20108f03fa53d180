#!/usr/bin/env bash
# Builds the extensions with ThreadSanitizer into build/tsan and runs the threaded native tests on them.
# Arguments go to pytest (default: the threads of the store, the links and the regions). Any report fails.
#
# What it cannot see: atomic_thread_fence, bytes that the kernel or an uninstrumented library writes (SSL_read, pread,
# UFFDIO_COPY), one memory through two mappings. The checksums of the stress tests are there for those.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/tsan
target=$out/site
reports=$PWD/$out/report

mkdir -p "$out"
rm -f "$reports".*
echo "tsan: building into $out ..."
.venv/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-build-isolation --no-deps \
    --upgrade --target "$target" --config-settings build-dir="$out/cmake" \
    --config-settings cmake.define.RAMSTER_SANITIZE=thread . \
    >"$out/build.log" 2>&1 || { cat "$out/build.log" >&2; exit 1; }

# As in asan.sh: the interpreter below .venv, with the two folders as plain PYTHONPATH.
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
export PYTHONPATH=$PWD/$target:$packages PYTHONNOUSERSITE=1
# libtsan must be the first library of the process, and the interpreter is not linked with it.
preload=$(cc -print-file-name=libtsan.so)
# ignore_noninstrumented_modules: the interpreter, OpenSSL, LZ4 and numpy are not built with -fsanitize=thread; of what
# they do only the locks and semaphores are seen (the GIL orders as it should), and accesses without the atomics between
# them would be reported for nothing. Accesses of our own code are always checked.
# handle_*=0: a lost page is SIGBUS and a fork's touch SIGSEGV by design. die_after_fork=0: tests fork with threads.
# log_path: reports of processes that tests start count as well. exitcode=0: the files decide, not the exit status of
# a process that a test looks at.
export TSAN_OPTIONS="log_path=$reports:exitcode=0:halt_on_error=0:second_deadlock_stack=1:history_size=4"
TSAN_OPTIONS+=":ignore_noninstrumented_modules=1:die_after_fork=0:handle_sigbus=0:handle_segv=0:handle_abort=0"
TSAN_OPTIONS+=":suppressions=$PWD/scripts/tsan.supp"
[ $# -gt 0 ] || set -- tests/native/test_store_threads.py tests/links tests/frontswap
# -R: where the kernel draws addresses from more bits than gcc 12's libtsan foresees, a process ends at its start with
# "unexpected memory mapping". -S: none of that interpreter's own packages.
status=0
setarch -R env LD_PRELOAD="$preload" "$python" -S -m pytest --capture=sys "$@" || status=$?
# Not a report: a forked child starts a thread where its parent had one, which gcc 12's libtsan remembers and only says.
for report in "$reports".*; do
    [ ! -e "$report" ] || sed -i '/^==[0-9]*==ThreadSanitizer: dup thread with used id /d' "$report"
done
found=$(find "$out" -maxdepth 1 -name 'report.*' -size +0 | wc -l)
if [ "$found" -gt 0 ]; then
    cat "$reports".* >&2
    echo "tsan: reports of $found processes, above" >&2
    exit 1
fi
exit "$status"
