#!/usr/bin/env bash
# Installs spdk_kv into .venv of this checkout, then runs its demo.
#
#   scripts/quickstart.sh [arguments of `spdk-kv demo`]
#
# Missing system packages (compiler, Python headers, venv, liburing) are installed only by root or
# where sudo asks for no password, and named first. Settings, by environment variable:
#   SPDK_KV_NO_SYSTEM_PACKAGES=1           install no system packages
#   SPDK_KV_PYTHON=python3.12              use this Python (3.10 or newer)
#   CMAKE_ARGS=-DSPDK_KV_URING=OFF         options of the build: SPDK_KV_URING and SPDK_KV_SPDK,
#                                          each AUTO, ON or OFF (see cython_src/CMakeLists.txt)
# Other settings of pip (PIP_INDEX_URL, PIP_FIND_LINKS ...) hold as they are.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed transformers
say "ready; later: $venv/bin/spdk-kv --help"
exec "$venv/bin/spdk-kv" demo "$@"
