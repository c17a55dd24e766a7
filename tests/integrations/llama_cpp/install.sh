#!/usr/bin/env bash
# Puts llama-cpp-python, and what the tests need beside spdk_kv, into the environment of the Python
# $1. The first time takes 10 to 30 minutes: there are no wheels of it, and pip keeps the one that it
# builds in its own cache.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# For this family of CPUs and not for this one alone, and without what reads pictures. What is set
# already stays.
export CMAKE_ARGS=${CMAKE_ARGS:-"-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"}
exec "$1" -m pip install -q -r "$here/requirements.txt"
