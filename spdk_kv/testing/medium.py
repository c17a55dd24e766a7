"""An open engine, and another way to its bytes where there is one."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, QueueOptions

Bytes = npt.NDArray[np.uint8]

# Three times 16 KiB, so that transfers of a few hundred KiB are cut, and at an odd place.
SMALL = QueueOptions(depth=4, segment_nbytes=48 << 10, hugepages=False)

_PAGE_NBYTES = 4096


@dataclass
class Medium:
    """An open engine over at least ``EngineContract.area_nbytes``, and another way to its bytes.

    With no other way, what was written is read back through the engine itself.

    Attributes:
        engine: What is tested.
        path: A file or node with the same bytes at the same offsets, or "".
        other: Another engine on the same bytes, such as a second initiator's, or None.
    """

    engine: Engine
    path: str = ""
    other: Engine | None = None

    def memory(self, nbytes: int, shift: int = 0) -> Bytes:
        """Like :func:`memory`, from the engine: memory that the drive reaches without a copy."""
        region = self.engine.allocate(nbytes + shift)
        view: Any = (ctypes.c_char * region.nbytes).from_address(region.address)
        view.region = region  # lives as long as any array over it
        array: Bytes = np.frombuffer(view, np.uint8)
        return array[shift : shift + nbytes]

    def peek(self, offset: int, nbytes: int) -> bytes:
        """The bytes on the medium, past the engine's queue where there is a way past it."""
        if not self.path:
            return read(self.other or self.engine, offset, nbytes)
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), nbytes, offset)

    def poke(self, offset: int, data: bytes) -> None:
        """Puts bytes on the medium; whole blocks, past the engine's queue where possible."""
        if not self.path:
            write(self.other or self.engine, offset, data)
            return
        with open(self.path, "r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, offset) == len(data)
            os.fsync(file.fileno())


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the first byte of ``array`` lies."""
    return int(array.__array_interface__["data"][0])


def memory(nbytes: int, shift: int = 0) -> Bytes:
    """``nbytes`` bytes at ``shift`` past a page boundary; the array keeps the pages alive."""
    region = memoryview(Region(nbytes + shift + _PAGE_NBYTES, False))
    array: Bytes = np.frombuffer(region, np.uint8)
    return array[shift : shift + nbytes]


def read(engine: Engine, offset: int, nbytes: int) -> bytes:
    """Reads through ``engine``; blocks, and raises what the engine raises."""
    into = memory(nbytes)
    transfer = engine.transfer(READ)
    transfer.keep(into)
    transfer.add(offset, address_of(into), nbytes)
    engine.run(transfer)
    return into.tobytes()


def write(engine: Engine, offset: int, data: bytes) -> None:
    """Writes through ``engine``; blocks, and raises what the engine raises."""
    source = memory(len(data))
    source[:] = np.frombuffer(data, np.uint8)
    transfer = engine.transfer(WRITE)
    transfer.keep(source)
    transfer.add(offset, address_of(source), len(data))
    engine.run(transfer)
