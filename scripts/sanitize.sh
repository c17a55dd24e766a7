#!/usr/bin/env bash
# The tests of what threads share, with extensions in which a sanitizer watches every access.
#
#   scripts/test.sh --sanitize [thread|address] [arguments of pytest]
#
# thread: ThreadSanitizer, which reports data races. address: AddressSanitizer for memory that is not
# ours, and UndefinedBehaviorSanitizer. Both by default. Needs gcc and its libraries (libtsan, libasan:
# they come with it) and setarch (util-linux). Builds into build/sanitize-*; what is in .venv stays.
#
# Python itself and torch are not watched. What a sanitizer may report is in scripts/sanitizers/.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Where threads meet: in the queue, in a store's records and sequences, in staging memory and in
# the engines' memory. Without those that fork beside threads, which ThreadSanitizer does not survive.
default_tests=(
    tests/engines/test_contract.py tests/engines/test_faults.py tests/engines/test_futures.py
    tests/engines/test_ng.py tests/engines/test_queue.py tests/engines/test_several.py
    tests/engines/test_submitters.py
    tests/link/test_emulated.py tests/link/test_pipeline.py tests/native tests/paths/copies
    tests/paths/test_admission.py tests/paths/test_backlog.py tests/placement/test_staging.py
    tests/sequence/test_reading.py tests/store/test_closing.py tests/store/test_concurrency.py
    tests/store/test_lives.py
)

kinds=(thread address)
case ${1:-} in
    thread | address)
        kinds=("$1")
        shift
        ;;
esac

# The extensions, watched by $1, and spdk_kv, in an environment that sees .venv's packages.
# Prints its Python.
build() {
    local kind=$1 folder=$root/build/sanitize-$1 flags=address,undefined site
    [ "$kind" = address ] || flags=$kind
    rm -rf "$folder/venv"
    "$venv/bin/python" -m venv --without-pip "$folder/venv"
    site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # A path, unlike a folder that .pth files are looked for in, leaves out .venv's own spdk_kv.
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$site/dependencies.pth"
    CFLAGS="-fsanitize=$flags -fno-omit-frame-pointer -g -O1" "$venv/bin/python" -m pip install \
        -q --no-deps --no-build-isolation --target "$site" -C build-dir="$folder/cmake" \
        -C cmake.build-type=None -C install.strip=false "$root" </dev/null >&2
    printf '%s\n' "$folder/venv/bin/python"
}

# Runs the tests watched by $1; fails with them, and where there is a report.
check() {
    local kind=$1 python library reports status=0
    shift
    printf '\n== %s\n' "$kind"
    case $kind in thread) library=libtsan.so ;; address) library=libasan.so ;; esac
    library=$(gcc -print-file-name=$library)
    [ -e "$library" ] || fail "gcc has no $library"
    python=$(build "$kind")
    reports=$(mktemp -d)
    # Ends with the status of the tests: the reports are counted below, also those of children.
    # Addresses at random would lie where ThreadSanitizer has its own (Linux 6.6 and newer).
    (
        cd "$root"
        export TSAN_OPTIONS="log_path=$reports/report exitcode=0 ignore_noninstrumented_modules=1 \
history_size=4 suppressions=$root/scripts/sanitizers/thread.supp"
        # Python frees little of what it has at its end.
        export ASAN_OPTIONS="log_path=$reports/report detect_leaks=0"
        export UBSAN_OPTIONS="log_path=$reports/report print_stacktrace=1"
        LD_PRELOAD=$library exec setarch "$(uname -m)" -R "$python" -m pytest -n 0 "$@" </dev/null
    ) || status=$?
    if [ -n "$(ls -A "$reports")" ]; then
        cat "$reports"/*
        status=1
    fi
    rm -rf "$reports"
    return $status
}

ensure_installed test
[ $# != 0 ] || set -- -q -k 'not fork' "${default_tests[@]}"
failed=()
for kind in "${kinds[@]}"; do
    check "$kind" "$@" || failed+=("$kind")
done
[ ${#failed[@]} = 0 ] || fail "failed: ${failed[*]}"
