# shellcheck shell=bash
# What quickstart.sh and test.sh share: find a Python, get what building needs, install into .venv.
# Sourced, not run. The functions speak through `say` and stop the script through `fail`.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp_file=$venv/spdk_kv-installed
# pip's notice about its own newer version helps nobody here.
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'spdk_kv: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# The first Python that is new enough, by its full path. SPDK_KV_PYTHON names one to use instead.
find_python() {
    local name path names=(python3 python3.13 python3.12 python3.11 python3.10)
    [ -z "${SPDK_KV_PYTHON:-}" ] || names=("$SPDK_KV_PYTHON")
    for name in "${names[@]}"; do
        path=$(command -v "$name") || continue
        # Asking it also weeds out the shims of version managers, which are there and cannot run.
        if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$path"
            return
        fi
    done
    return 1
}

has_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

has_headers() {
    "$1" -c 'import os.path, sysconfig as s
raise SystemExit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' 2>/dev/null
}

# CMake takes $CC, or else cc, gcc or clang. A compiler without the C library's headers is none.
has_compiler() {
    local name
    for name in ${CC:-cc gcc clang}; do
        if command -v "$name" >/dev/null &&
            printf '#include <stdio.h>\n' | "$name" -E -x c - >/dev/null 2>&1; then
            return 0
        fi
    done
    return 1
}

# Prints the version of a library that pkg-config finds, or "none".
library_version() { pkg-config --modversion "$1" 2>/dev/null || printf 'none\n'; }

has_uring() { pkg-config --atleast-version=2.2 liburing 2>/dev/null; }

# Prints the system packages (named as Debian and Ubuntu do) that a build with Python $1 lacks and
# cannot do without. A Python that the distribution did not install has no packages there.
required_packages() {
    local version=''
    case $(readlink -f "$1") in
        /usr/bin/*) version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ;;
    esac
    if [ -n "$version" ]; then
        # A .venv that works needs no second one.
        venv_works || has_venv "$1" || printf 'python%s-venv\n' "$version"
        has_headers "$1" || printf 'python%s-dev\n' "$version"
    fi
    has_compiler || printf 'gcc\nlibc6-dev\n'
}

optional_packages() {
    # Whoever builds without io_uring on purpose needs nothing for it.
    case "${CMAKE_ARGS:-} ${SKBUILD_CMAKE_ARGS:-}" in
        *SPDK_KV_URING=OFF*) return ;;
    esac
    if ! has_uring; then
        command -v pkg-config >/dev/null || printf 'pkg-config\n'
        # A liburing-dev that is there and too old does not get younger by asking again.
        [ "$(library_version liburing)" != none ] || printf 'liburing-dev\n'
    fi
}

# Sets apt_get to the command that may install packages, or returns 1.
may_install() {
    [ "${SPDK_KV_NO_SYSTEM_PACKAGES:-0}" != 1 ] && command -v apt-get >/dev/null || return 1
    apt_get=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q)
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
    apt_get=(sudo -n "${apt_get[@]}")
}

# Installs the system packages that Python $1 and the build lack, where it may; says so before.
get_system_packages() {
    local required optional apt_get
    mapfile -t required < <(required_packages "$1")
    mapfile -t optional < <(optional_packages)
    set -- "${required[@]}" "${optional[@]}"
    if [ $# = 0 ] || ! may_install; then
        return
    fi
    say "installing system packages: $* (set SPDK_KV_NO_SYSTEM_PACKAGES=1 to forbid it)"
    # A new machine has no package lists yet. What fails here, check_system finds missing.
    "${apt_get[@]}" update >&2 </dev/null || true
    # Apart from each other, so that a missing extra does not cost us a needed one.
    if [ ${#required[@]} != 0 ]; then
        "${apt_get[@]}" install --no-install-recommends "${required[@]}" >&2 </dev/null || true
    fi
    if [ ${#optional[@]} != 0 ]; then
        "${apt_get[@]}" install --no-install-recommends "${optional[@]}" >&2 </dev/null || true
    fi
}

# Stops where Python $1 and the build lack what they need; says what goes on without.
check_system() {
    local required optional
    mapfile -t required < <(required_packages "$1")
    mapfile -t optional < <(optional_packages)
    if [ ${#required[@]} != 0 ]; then
        fail "cannot go on without: ${required[*]}. Install what is missing and run this again" \
            "(Debian, Ubuntu: apt-get install ${required[*]} ${optional[*]})"
    fi
    # Only a Python that the distribution did not install gets this far without them.
    venv_works || has_venv "$1" || fail "$1 lacks the modules venv or ensurepip: use another Python"
    has_headers "$1" || fail "$1 lacks its C headers (Python.h): use another Python"
    if [ ${#optional[@]} != 0 ]; then
        say "going on without io_uring: the thread engine serves instead" \
            "(to have it: apt-get install liburing-dev pkg-config, then run this again)"
    elif ! has_uring && [ "$(library_version liburing)" != none ]; then
        say "going on without io_uring: the thread engine serves instead" \
            "(liburing $(library_version liburing) is older than 2.2)"
    fi
}

venv_works() { "$venv/bin/python" -c 'import pip' 2>/dev/null; }

hash_of() { sha256sum | cut -d' ' -f1; }

# What the compiled part is built with, as one hash.
tools_hash() {
    {
        # A moved checkout needs its paths written anew.
        printf '%s\n' "$root" "${CMAKE_ARGS:-}" "${SKBUILD_CMAKE_ARGS:-}" \
            "$(library_version liburing)" "$(library_version spdk_nvme)"
        "$venv/bin/python" -VV
    } | hash_of
}

# What it is built from, as one hash. Python sources are not in it, because the editable install
# reads them from the checkout.
source_hash() {
    (
        cd "$root" || exit
        find cython_src -type f ! -name '.*' -print0 | LC_ALL=C sort -z |
            xargs -0 sha256sum pyproject.toml scripts/constraints.txt
    ) | hash_of
}

# Whether .venv holds this checkout with the extra $1; 'test' covers all others.
is_installed() {
    local tools source extras
    venv_works && read_stamp || return 1
    [ "$tools $source" = "$(tools_hash) $(source_hash)" ] &&
        { [ "$extras" = "$1" ] || [ "$extras" = test ]; }  # test holds all the others
}

# Fills the caller's tools, source and extras with what is installed.
read_stamp() { [ -f "$stamp_file" ] && read -r tools source extras <"$stamp_file"; }

# Makes .venv hold spdk_kv, editable, with the extras $1; does nothing where it already does.
ensure_installed() {
    local wanted=$1 python options=() tools='' source extras
    if is_installed "$wanted"; then
        return
    fi
    python=$(find_python) ||
        fail "no Python 3.10 or newer found (Debian, Ubuntu: apt-get install python3 python3-venv)"
    if venv_works; then
        python=$venv/bin/python
    fi
    get_system_packages "$python"
    check_system "$python"
    if ! venv_works; then
        say "making $venv with $("$python" --version)"
        # No --system-site-packages: what happens to be installed outside would then decide which
        # versions run here, and the same commands would give different results on two machines.
        # Cleared only if its Python is gone: one that merely lacks pip may be somebody's own.
        "$venv/bin/python" -c '' 2>/dev/null || options=(--clear)
        "$python" -m venv "${options[@]}" "$venv" || fail "could not make $venv"
    fi
    # CMake's cache remembers libraries and options that are gone. Changed sources alone leave it
    # valid, and then only what changed is compiled again.
    read_stamp || true
    [ "$tools" = "$(tools_hash)" ] || rm -rf "$root/build"
    rm -f "$stamp_file"
    options=()
    # Progress bars are for people; a log gets the errors alone.
    [ -t 2 ] || options+=(-q)
    if ! "$venv/bin/python" -c 'from importlib.util import find_spec as find
raise SystemExit(find("torch") is None)'; then
        # A torch that is there was chosen by somebody, and stays.
        options+=(-c "$root/scripts/constraints.txt")
    fi
    say "installing spdk_kv${wanted:+[$wanted]} (the first time takes some minutes)"
    # With build isolation: pip fetches Cython and, where the system has none, CMake and Ninja for
    # the build alone, so that running spdk_kv needs none of them.
    "$venv/bin/python" -m pip install "${options[@]}" -e "$root${wanted:+[$wanted]}" </dev/null ||
        fail "the installation failed; the lines above say why"
    printf '%s\n' "$(tools_hash) $(source_hash) $wanted" >"$stamp_file"
}
