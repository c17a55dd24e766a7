"""Stores with two paths for tests: available memory that can be changed, and the real pages."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import spdk_kv
from sequence.helpers import Reference
from spdk_kv.engines.uring import why_unavailable
from spdk_kv.memory.available import MemoryReader, cached_nbytes
from spdk_kv.paths.units import TrackedUnit
from spdk_kv.store import KVStore
from store.helpers import open_store

DIRECT_ENGINES = ["threads"] if why_unavailable() else ["uring", "threads"]
MIB = 1 << 20
PLENTY = 1 << 30
# Four layers of which K and V are 1 MiB each when full: rows of 512 bytes, 32 to a chunk.
SHAPE = spdk_kv.KVShape(4, 2, 64, torch.float32, 2048)
UNIT_NBYTES = 1 << 20
UNITS = 8


def open_dual(where: Path | str, available: int = PLENTY, **options: Any) -> KVStore:
    """A store with both paths, with ``available`` bytes of available memory."""
    store = open_store(where, **({"capacity": "64 MiB"} | options))
    set_available(store, available)
    return store


def set_available(store: KVStore, nbytes: int) -> None:
    """Holds from the next decision on. Without the memory pressure of this machine, for which
    others may be to blame."""
    store.paths._memory.close()
    store.paths._memory = MemoryReader(nbytes, root=Path("/nonexistent"))


def filled(
    store: KVStore, name: str = "s", tokens: int = 2048, **options: Any
) -> tuple[Any, Reference]:
    """A sequence, all of it on the device."""
    sequence = store.sequence(name, SHAPE, **options)
    reference = Reference(SHAPE, len(store.sequences()) * 1000)
    reference.append(sequence, tokens)
    for layer in range(SHAPE.layers):
        sequence.settle(layer)
    return sequence, reference


def scans(sequence: Any, reference: Reference, count: int = 1) -> None:
    for _ in range(count):
        reference.check(sequence)


def settled(sequence: Any) -> None:
    """Waits until all that was appended is on the device."""
    for layer in range(sequence.shape.layers):
        sequence.settle(layer)


def units(store: KVStore) -> list[TrackedUnit]:
    return [unit for group in store.paths._scans.groups for unit in group.units]


def paths(store: KVStore) -> list[str]:
    """Of each unit, C for page cache or D for direct."""
    return ["C" if unit.cached else "D" for unit in units(store)]


def dropped(store: KVStore) -> None:
    """Waits until what was demoted is out of the page cache."""
    assert store.paths._dropper is not None
    store.paths._dropper._thread.submit(lambda: None).result()


@contextmanager
def dropping_held(store: KVStore) -> Iterator[None]:
    """Meanwhile the thread that drops what was demoted does not come to it."""
    goes_on = threading.Event()
    assert store.paths._dropper is not None
    store.paths._dropper._thread.submit(goes_on.wait)
    try:
        yield
    finally:
        goes_on.set()


def resident(store: KVStore, unit: TrackedUnit) -> int:
    """Bytes of ``unit`` that the kernel has in its page cache."""
    assert store.paths.routes.cache is not None
    each = unit.nbytes // unit.count
    found = [
        cached_nbytes(store.paths.routes.cache.fd, offset, each)
        for offset, _ in unit.ranges(0, each)
    ]
    assert None not in found
    return sum(filter(None, found))


def resident_nbytes(store: KVStore) -> int:
    return sum(resident(store, unit) for unit in units(store))


def empty_cache(path: str | Path) -> None:
    """What the kernel does under pressure, to this one file: every clean page goes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def fill_cache(path: str | Path) -> None:
    """Reads all of a file or device into the page cache."""
    with open(path, "rb") as file:
        while file.read(MIB):
            pass
