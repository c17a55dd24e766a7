"""What the engine tests run on: an engine over a real medium, and a second way to its bytes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location
from support import blockdev

NBYTES = 8 << 20
SMALL = QueueOptions(depth=4, segment_nbytes=48 << 10, hugepages=False)

FILES = [f"{engine}-file" for engine in ("uring", "threads", "pagecache")]
BLOCKS = ["uring-loop", "uring-partition", "threads-loop", "pagecache-loop"]
KEEPING = [*FILES, *BLOCKS, "ram"]
EVERY = [*KEEPING, "null"]


class _Held(np.ndarray):
    """An array that keeps what its bytes lie in."""

    def __new__(cls, of: np.ndarray, region: Any) -> _Held:
        held = of.view(cls)
        held.region = region
        return held

    def __array_finalize__(self, of: Any) -> None:
        self.region = getattr(of, "region", None)


@dataclass
class Medium:
    """An open engine, and the path of its bytes ("" where there is none).

    ``other``: another engine on the same bytes, as a second initiator would be.
    """

    engine: Engine
    path: str
    other: Engine | None = None

    def memory(self, nbytes: int, shift: int = 0) -> np.ndarray:
        """As :func:`memory`, but memory that the device reaches."""
        if self.engine.name != "spdk":
            return memory(nbytes, shift)
        region = self.engine.allocate(nbytes + shift)
        there = (ctypes.c_char * region.nbytes).from_address(region.address)
        # Held by the array: what is sliced from it holds the array.
        return _Held(np.frombuffer(there, np.uint8), region)[shift : shift + nbytes]

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


def address_of(view: np.ndarray) -> int:
    return int(view.__array_interface__["data"][0])


def memory(nbytes: int, shift: int = 0) -> np.ndarray:
    """Bytes at ``shift`` past a page boundary; the array keeps the pages alive."""
    region = Region(nbytes + shift + 4096, False)
    return np.frombuffer(region, np.uint8)[shift : shift + nbytes]


def read(engine: Engine, offset: int, nbytes: int) -> bytes:
    into = memory(nbytes)
    transfer = engine.transfer(READ)
    transfer.keep(into)
    transfer.add(offset, address_of(into), nbytes)
    engine.run(transfer)
    return into.tobytes()


def write(engine: Engine, offset: int, data: bytes) -> None:
    source = memory(len(data))
    source[:] = np.frombuffer(data, np.uint8)
    transfer = engine.transfer(WRITE)
    transfer.keep(source)
    transfer.add(offset, address_of(source), len(data))
    engine.run(transfer)


def image(folder: Path, nbytes: int = NBYTES) -> Path:
    """A preallocated file."""
    path = folder / "medium.img"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    return path


@contextlib.contextmanager
def medium(kind: str, folder: Path, options: QueueOptions = SMALL) -> Iterator[Medium]:
    """``kind``: an engine's name, and after a dash what it stands on."""
    name, _, on = kind.partition("-")
    with contextlib.ExitStack() as stack:
        path = ""
        settings: dict[str, Any] = {"options": options}
        if on == "":
            location = parse_location(f"{name}://")
            settings["capacity_nbytes"] = NBYTES
        elif on == "file":
            path = str(image(folder))
            location = parse_location(f"file://{folder}")
        elif on == "loop":
            path = stack.enter_context(blockdev.loop_device(image(folder)))
            location = parse_location(f"block://{path}")
        else:
            path = stack.enter_context(blockdev.partition(image(folder, NBYTES + (1 << 20))))
            location = parse_location(f"block://{path}")
        engine = open_engine(location, path, engine=name, **settings)
        stack.callback(engine.close)
        yield Medium(engine, path)
