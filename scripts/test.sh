#!/usr/bin/env bash
# Lint, types and tests, in .venv of this checkout, which is made or brought up to date first.
#
#   scripts/test.sh [--lab] [--long] [arguments of pytest]
#   scripts/test.sh --sanitize ...         see sanitize.sh
#   scripts/test.sh --hosts ...            see hosts.sh
#
# --lab: also the tests in tests/lab, which boot virtual machines (vagrant/README.md).
# --long: more rounds of everything random (kills, interrupts, hypothesis), and every way to build.
#
# The tests run in two steps, on two workers where there are two cores (-n N: on N). Those marked
# `machine` depend on the kernel's reclaim, on timing or on what else runs, so they run afterwards,
# one at a time; one that fails is tried once more, and named if it passes then.
# Every step runs, whatever failed before it; the exit status is 1 if any failed. The settings are
# those of quickstart.sh.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while :; do
    case ${1:-} in
        --lab) export SPDK_KV_LAB=1 ;;
        --long) export SPDK_KV_LONG=1 ;;
        --sanitize) exec "$root/scripts/sanitize.sh" "${@:2}" ;;
        --hosts) exec "$root/scripts/hosts.sh" "${@:2}" ;;
        *) break ;;
    esac
    shift
done

failed=()
took=()
NOTHING_COLLECTED=5 # pytest's exit status

# Runs a module of Python as the step $1; its exit status is in `status`.
run_step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    status=0
    "$venv/bin/python" -m "$@" </dev/null || status=$?
    took+=("$name $((SECONDS - start)) s")
}

step() {
    run_step "$@"
    [ "$status" = 0 ] || failed+=("$1")
}

# As `step`, but an empty selection fails only if no run of pytest finds a test.
nothing_collected=0
pytest_step() {
    run_step "$1" pytest "${@:2}"
    case $status in
        0) ;;
        "$NOTHING_COLLECTED") nothing_collected=$((nothing_collected + 1)) ;;
        *) failed+=("$1") ;;
    esac
}

ensure_installed test
cd "$root"
step 'ruff check' ruff check
step 'ruff format' ruff format --check
step 'mypy' mypy
# Whether the stubs say what the extensions that were built are.
step 'stubtest' mypy.stubtest spdk_kv._native --ignore-unused-allowlist \
    --allowlist cython_src/stubtest_allowlist.txt

SPDK_KV_TEST_SUMMARY=$(mktemp)
export SPDK_KV_TEST_SUMMARY
trap 'rm -f "$SPDK_KV_TEST_SUMMARY"' EXIT

cores=$(nproc)
second_try=(--reruns 1)
# A debugger stops at the first failure.
case " $* " in *' --pdb '*) second_try=() ;; esac
# Last, so that pytest's summaries stand at the end of the log. Files in the order of conftest.py.
pytest_step 'pytest' -n $((cores < 2 ? cores : 2)) --dist loadfile --no-loadscope-reorder "$@" \
    --machine-tests exclude
pytest_step 'pytest (machine)' "$@" -n 0 "${second_try[@]}" --machine-tests only
[ $nothing_collected -lt 2 ] || failed+=('pytest: no test collected')

printf '\n== summary\n'
printf '%s\n' "${took[@]}"
cat "$SPDK_KV_TEST_SUMMARY"
if [ ${#failed[@]} != 0 ]; then
    printf '\nfailed:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
printf '\nall steps passed\n'
