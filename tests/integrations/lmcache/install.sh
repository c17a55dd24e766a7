#!/usr/bin/env bash
# Makes the environment of the Python $1 one in which LMCache runs without a GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$1" -m pip install -q -r "$here/requirements.txt"
pinned=$(grep -o 'lmcache==[0-9.]*[0-9]' "$here/requirements.txt")
"$1" -m pip install -q --no-deps "$pinned"
