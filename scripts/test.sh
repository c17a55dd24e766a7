#!/usr/bin/env bash
# Lint, types and tests, in .venv of this checkout, which is made or brought up to date first.
#
#   scripts/test.sh [--lab] [arguments of pytest]
#
# --lab: also the tests in tests/lab, which boot virtual machines (vagrant/README.md).
# Every step runs, whatever failed before it; the exit status is 1 if any failed. The settings are
# those of quickstart.sh.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

failed=()
if [ "${1:-}" = --lab ]; then
    export SPDK_KV_LAB=1
    shift
fi

step() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$venv/bin/python" -m "$@" </dev/null || failed+=("$name")
}

ensure_installed test
cd "$root"
step 'ruff check' ruff check
step 'ruff format' ruff format --check
step 'mypy' mypy
# Last, so that pytest's summary stands at the end of the log.
step 'pytest' pytest "$@"

if [ ${#failed[@]} != 0 ]; then
    printf '\nfailed:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
printf '\nall steps passed\n'
