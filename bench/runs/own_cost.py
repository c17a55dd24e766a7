"""What our own code costs, with no drive or with very small blobs: time per call, memory.

    python bench/runs/own_cost.py fill FOLDER COUNT
    python bench/runs/own_cost.py reopen FOLDER

against_fio.py runs each of these in a process of its own; they print JSON.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from spdk_kv._native.transfer import READ
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.store import open as open_store
from spdk_kv.units import MIB

SEGMENTS = 10_000
_BATCH = 1000


def null_engine(quick: bool) -> dict[str, float]:
    """Microseconds per small get and put, and per segment of a large transfer: the median of
    many batches, so that a burst of other work does not count."""
    rounds = 10 if quick else 50
    tensor = torch.arange(256, dtype=torch.float32)
    out = torch.empty_like(tensor)
    with open_store("null://", flush_interval_s=None) as store:
        store.put("key", tensor)
        figures = {
            "get_us": _per_call_us(lambda: store.get("key"), rounds),
            "get_out_us": _per_call_us(lambda: store.get("key", out=out), rounds),
            "put_us": _per_call_us(lambda: store.put("key", tensor), rounds),
        }
    engine = open_engine(parse_location("null://"), options=QueueOptions(64, 16384))
    memory = engine.allocate(64 * 16384)
    sizes = np.full(SEGMENTS, 16384, dtype=np.uint64)
    offsets = np.arange(SEGMENTS, dtype=np.uint64) * np.uint64(16384)
    addresses = np.uint64(memory.address) + offsets % np.uint64(memory.nbytes)

    def transfer() -> None:
        made = engine.transfer(READ)
        made.keep(memory)
        made.add_many(offsets, addresses, sizes)
        engine.run(made)

    figures["segment_us"] = _per_call_us(transfer, rounds, calls=5) / SEGMENTS
    engine.close()
    return figures


def many_blobs(folder: Path, count: int) -> dict[str, float]:
    """``count`` blobs of 4 KiB: MiB of memory that their records take, after putting them and
    after reopening, and the seconds that reopening takes."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        filled = _child("fill", str(folder), str(count))
        return filled | _child("reopen", str(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _per_call_us(call: Callable[[], object], rounds: int, calls: int = 500) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls)
    return float(np.median(times)) * 1e6


def _child(*words: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def _fill(folder: str, count: int) -> dict[str, float]:
    tensor = torch.zeros(1024, dtype=torch.float32)
    with open_store(f"file://{folder}", capacity=count * 4096 + 64 * MIB) as store:
        # Whatever the first use of every part costs is not the records' fault.
        store.put_many({f"warm-{number}": tensor for number in range(_BATCH)})
        store.flush()
        before = _resident_mib()
        began = time.perf_counter()
        for start in range(0, count, _BATCH):
            store.put_many(
                {
                    f"document-{n}/layer-0/k": tensor
                    for n in range(start, min(count, start + _BATCH))
                }
            )
        store.flush()
        return {
            "blobs": count,
            "put_s": time.perf_counter() - began,
            "put_memory_mib": _resident_mib() - before,
        }


def _reopen(folder: str) -> dict[str, float]:
    with open_store("null://"):  # everything is imported and warm
        pass
    before = _resident_mib()
    began = time.perf_counter()
    with open_store(f"file://{folder}") as store:
        took = time.perf_counter() - began
        return {
            "reopened_blobs": len(store),
            "reopen_s": took,
            "reopen_memory_mib": _resident_mib() - before,
        }


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        print(json.dumps(_fill(sys.argv[2], int(sys.argv[3]))))
    else:
        print(json.dumps(_reopen(sys.argv[2])))
