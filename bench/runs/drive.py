"""Every run that against_fio.py makes on one drive: fio's and ours, each some seconds long.

A run is a function without arguments that returns a Figure. All of them reach files on one
filesystem that were allocated and written before; fio and the engines share one file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fio
from spdk_kv._native.transfer import READ
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location
from spdk_kv.measure import Workload, fill, filled_memory, measure
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from spdk_kv.units import GIB, KIB, MIB

SEQUENTIAL = (MIB, 16)
RANDOM = (16 * KIB, 64)
TENSOR_NBYTES = 64 * MIB
# What one transfer of the random case holds: the target's 1,000 segments.
RANDOM_SEGMENTS = 1000
ENGINES = ("uring", "threads", "pagecache")


@dataclass(frozen=True)
class Figure:
    gib_s: float
    cpu_s_per_gib: float


Run = Callable[[], Figure]


@contextmanager
def drive_runs(folder: Path, size_nbytes: int, seconds: float) -> Iterator[dict[str, Run]]:
    """All runs by name, in the order in which one round makes them. Lays the files out first and
    removes them afterwards."""
    with ExitStack() as undo:
        path = folder / "against_fio.data"
        # Buffered runs have a file of their own: pages left in the cache, dirty ones above all,
        # would slow every direct run that comes after them on the same file.
        buffered_path = folder / "against_fio.buffered"
        for file, name in ((path, "uring"), (buffered_path, "pagecache")):
            undo.callback(file.unlink, missing_ok=True)
            _lay_out(file, name, size_nbytes)
        engines: dict[tuple[str, tuple[int, int]], Engine] = {}
        for shape in (SEQUENTIAL, RANDOM):
            for name in ENGINES:
                engine = _open(buffered_path if name == "pagecache" else path, name, shape)
                undo.callback(engine.close)
                engines[name, shape] = engine
        store = _store(undo, folder / "store", size_nbytes)
        yield {
            **_sequential(path, engines, size_nbytes, seconds, "read"),
            **_gets(store, seconds),
            **_sequential(path, engines, size_nbytes, seconds, "write"),
            **_puts(store, seconds),
            **_random(path, engines, size_nbytes, seconds),
        }


def _sequential(
    path: Path,
    engines: dict[tuple[str, tuple[int, int]], Engine],
    size: int,
    seconds: float,
    op: str,
) -> dict[str, Run]:
    runs: dict[str, Run] = {
        f"fio {op}": lambda: _fio(path, op, SEQUENTIAL, seconds, huge=False),
        f"fio {op}, hugepages": lambda: _fio(path, op, SEQUENTIAL, seconds, huge=True),
    }
    for name in ENGINES:
        engine = engines[name, SEQUENTIAL]
        for summed in (False, True) if name == "uring" else (False,):
            load = Workload(op, SEQUENTIAL[0], size, summed)
            runs[f"{name} {op}" + (", checksum" if summed else "")] = _measured(
                engine, load, seconds
            )
    return runs


def _random(
    path: Path, engines: dict[tuple[str, tuple[int, int]], Engine], size: int, seconds: float
) -> dict[str, Run]:
    runs: dict[str, Run] = {
        "fio randread": lambda: _fio(path, "randread", RANDOM, seconds, huge=False),
        "fio randread, hugepages": lambda: _fio(path, "randread", RANDOM, seconds, huge=True),
    }
    load = Workload("randread", RANDOM[0], size)
    for name in ENGINES:
        runs[f"{name} randread"] = _measured(engines[name, RANDOM], load, seconds)
    runs["one transfer"] = _one_transfer(engines["uring", RANDOM], size, seconds)
    return runs


def _measured(engine: Engine, load: Workload, seconds: float) -> Run:
    def run() -> Figure:
        seen = measure(engine, load, seconds)
        if load.op == "write" and not engine.direct:
            engine.flush()  # not timed: the next run is not to pay for this one's dirty pages
        return Figure(seen.gib_s, seen.cpu_s_per_gib)

    return run


def _fio(path: Path, op: str, shape: tuple[int, int], seconds: float, *, huge: bool) -> Figure:
    seen = fio.run_fio(path, op, *shape, seconds, huge=huge)
    return Figure(seen.gib_s, seen.cpu_s_per_gib)


def _one_transfer(engine: Engine, size: int, seconds: float) -> Run:
    """Transfers of 1,000 random segments, one at a time: each fills the queue and drains it."""
    nbytes = RANDOM[0]
    memory = filled_memory(engine, RANDOM_SEGMENTS * nbytes)
    addresses = np.uint64(memory.address) + np.arange(RANDOM_SEGMENTS, dtype=np.uint64) * np.uint64(
        nbytes
    )
    sizes = np.full(RANDOM_SEGMENTS, nbytes, dtype=np.uint64)
    random = np.random.default_rng(2)

    def work() -> int:
        offsets = random.integers(0, size // nbytes, RANDOM_SEGMENTS, dtype=np.uint64)
        transfer = engine.transfer(READ)
        transfer.keep(memory)
        transfer.add_many(offsets * np.uint64(nbytes), addresses, sizes)
        engine.run(transfer)
        return RANDOM_SEGMENTS * nbytes

    return lambda: _timed(work, seconds)


def _gets(store: KVStore, seconds: float) -> dict[str, Run]:
    keys = store.keys()
    out = torch.ones(TENSOR_NBYTES, dtype=torch.uint8)
    turn = iter(range(1 << 62))

    def get(**options: Any) -> int:
        store.get(keys[next(turn) % len(keys)], **options)
        return TENSOR_NBYTES

    def run(verify: bool, **options: Any) -> Figure:
        store.verify = verify
        return _timed(lambda: get(**options), seconds)

    return {
        "get": lambda: run(True),
        "get, no checksum": lambda: run(False),
        "get out=": lambda: run(True, out=out),
    }


def _puts(store: KVStore, seconds: float) -> dict[str, Run]:
    """Puts of an ordinary tensor that replace the blobs there are; now and then the store has to
    commit so that replaced extents come free, which is timed as well."""
    keys = store.keys()
    tensor = torch.randint(0, 256, (TENSOR_NBYTES,), dtype=torch.uint8)
    turn = iter(range(1 << 62))

    def put(flush: bool) -> int:
        store.put(keys[next(turn) % len(keys)], tensor)
        if flush:
            store.flush()
        return TENSOR_NBYTES

    return {
        "put": lambda: _timed(lambda: put(False), seconds),
        "put and flush": lambda: _timed(lambda: put(True), seconds),
    }


def _timed(work: Callable[[], int], seconds: float) -> Figure:
    """``work()`` over and over; it returns the bytes that it moved."""
    nbytes = 0
    cpu = time.process_time()
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not nbytes:
        nbytes += work()
    elapsed = time.perf_counter() - began
    return Figure(nbytes / GIB / elapsed, (time.process_time() - cpu) / (nbytes / GIB))


def _open(path: Path, name: str, shape: tuple[int, int]) -> Engine:
    options = QueueOptions(segment_nbytes=shape[0], depth=shape[1])
    return open_engine(parse_location(str(path.parent)), str(path), engine=name, options=options)


def _lay_out(path: Path, name: str, nbytes: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    finally:
        os.close(fd)
    engine = _open(path, name, SEQUENTIAL)
    try:
        fill(engine, nbytes)
    finally:
        engine.close()


def _store(undo: ExitStack, folder: Path, nbytes: int) -> KVStore:
    """A store of ``nbytes``, every extent of which was written once, half of it then in use."""

    def remove() -> None:
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()

    if folder.exists():
        raise RuntimeError(f"{folder} is there already: an earlier run was killed? Remove it")
    count = nbytes // TENSOR_NBYTES
    store = open_store(
        f"file://{folder}", capacity=count * TENSOR_NBYTES, engine="uring", flush_interval_s=None
    )
    undo.callback(remove)
    undo.callback(store.close)
    tensor = torch.randint(0, 256, (TENSOR_NBYTES,), dtype=torch.uint8)
    for number in range(count):
        store.put(f"tensor-{number}", tensor)
    for number in range(count // 2, count):
        store.delete(f"tensor-{number}")
    store.flush()
    return store
