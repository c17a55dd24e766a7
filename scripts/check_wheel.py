"""Puts and gets through an installed wheel: what cibuildwheel runs on each one it builds.

    python scripts/check_wheel.py

Whatever else a container lacks, the engine `uring` has to be inside; where the kernel or the
container forbids io_uring, it is only imported.
"""

from __future__ import annotations

import importlib
import tempfile

import torch

import spdk_kv


def put_and_get(uri: str, engine: str) -> None:
    """Compares a tensor with what comes back, also from a store that was opened again."""
    tensor = torch.arange(300_000, dtype=torch.float32).reshape(3, -1)
    with spdk_kv.open(uri, capacity="64 MiB", engine=engine) as store:
        store.put("key", tensor)
        assert torch.equal(store.get("key"), tensor)
    with spdk_kv.open(uri, engine=engine) as store:
        assert torch.equal(store.get("key"), tensor)


def main() -> None:
    importlib.import_module("spdk_kv._native.engines.uring")
    for engine in ("pagecache", "uring"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                put_and_get(f"file://{folder}/store", engine)
            except spdk_kv.EngineUnavailable as forbidden:
                if engine != "uring":
                    raise
                print(f"uring: {forbidden}")
            else:
                print(f"{engine}: put, get and reopened")


if __name__ == "__main__":
    main()
