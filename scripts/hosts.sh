#!/usr/bin/env bash
# The plug-ins against the engines that they are for, each in an environment of its own, because
# what the engines ask for does not go together.
#
#   scripts/test.sh --hosts [HOST...] [-- arguments of pytest]
#
# HOST: a folder of tests/integrations with a requirements.txt; by default all of them. What they
# need is installed into .hosts/HOST the first time and whenever it changed, which takes minutes and
# gigabytes (llama-cpp-python is compiled). A test that skips says why; one that fails, or a host
# that cannot be installed, fails the run.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

hosts=()
while [ $# != 0 ]; do
    case $1 in
        --) shift && break ;;
        -*) fail "unknown option $1 (arguments of pytest come after --)" ;;
        *) hosts+=("$1") && shift ;;
    esac
done
if [ ${#hosts[@]} = 0 ]; then
    for file in "$root"/tests/integrations/*/requirements.txt; do
        hosts+=("$(basename "$(dirname "$file")")")
    done
fi

# What the tests themselves need, whatever the host.
testing=(pytest pytest-timeout hypothesis numpy click rich)

# Makes .hosts/$1 hold the host $1; does nothing where it does already.
install_host() {
    local host=$1 recipe=$root/tests/integrations/$1 folder=$root/.hosts/$1 wanted python
    if [ ! -f "$recipe/requirements.txt" ]; then
        say "no host $host: there is no tests/integrations/$host/requirements.txt"
        return 1
    fi
    wanted=$(cat "$recipe/requirements.txt" "$recipe/install.sh" "$root/scripts/constraints.txt" \
        2>/dev/null | hash_of)
    [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ] || return 0
    say "installing $host into .hosts/$host (the first time takes some minutes)"
    python=$(find_python) || return 1
    rm -rf "$folder"
    # In a condition `set -e` does nothing, so that each step has to say that it failed.
    "$python" -m venv "$folder" || return 1
    python=$folder/bin/python
    # Torch first, and by itself: what comes after is satisfied with it.
    "$python" -m pip install -q -r "$root/scripts/constraints.txt" </dev/null || return 1
    "$python" -m pip install -q "${testing[@]}" </dev/null || return 1
    if [ -f "$recipe/install.sh" ]; then
        bash -e "$recipe/install.sh" "$python" </dev/null || return 1
    else
        "$python" -m pip install -q -r "$recipe/requirements.txt" </dev/null || return 1
    fi
    printf '%s\n' "$wanted" >"$folder/installed"
}

ensure_installed test
cd "$root"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$wheels" "$root" </dev/null

failed=()
for host in "${hosts[@]}"; do
    printf '\n== %s\n' "$host"
    python=$root/.hosts/$host/bin/python
    if ! install_host "$host" ||
        ! "$python" -m pip install -q --no-deps --force-reinstall "$wheels"/*.whl </dev/null; then
        failed+=("$host: not installed")
    elif ! "$python" -m pytest "tests/integrations/$host" "$@" </dev/null; then
        failed+=("$host")
    fi
done

if [ ${#failed[@]} != 0 ]; then
    printf '\nfailed:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
printf '\nall hosts passed: %s\n' "${hosts[*]}"
