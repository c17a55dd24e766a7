"""Inside the lab: the spdk engine with plain reads and writes of bytes, and bytes to compare."""

from __future__ import annotations

import ctypes
import hashlib
import json
from typing import Any

from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location

# A busy host may let the machine wait as long.
PATIENCE_S = 300.0


def open_drive(address: str, **options: Any) -> Engine:
    """The engine on namespace 1 of the drive at a PCI address."""
    return open_engine(parse_location(f"spdk://{address}/1"), options=QueueOptions(**options))


def pattern(seed: int, nbytes: int) -> bytes:
    """Bytes that are found at one place only."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(nbytes)


def write(engine: Engine, offset: int, data: bytes) -> None:
    """From ordinary memory, so through the engine's slots."""
    memory = ctypes.create_string_buffer(data, len(data))
    transfer = engine.transfer(WRITE)
    transfer.keep(memory)
    transfer.add(offset, ctypes.addressof(memory), len(data))
    engine.run(transfer, PATIENCE_S)


def read(engine: Engine, offset: int, nbytes: int, timeout_s: float = PATIENCE_S) -> bytes:
    """Into ordinary memory, through the engine's slots."""
    memory = ctypes.create_string_buffer(nbytes)
    transfer = engine.transfer(READ)
    transfer.keep(memory)
    transfer.add(offset, ctypes.addressof(memory), nbytes)
    engine.run(transfer, timeout_s)
    return memory.raw


def read_direct(engine: Engine, offset: int, nbytes: int) -> bytes:
    """Into memory that the device reaches."""
    memory = engine.allocate(nbytes)
    transfer = engine.transfer(READ)
    transfer.keep(memory)
    transfer.add(offset, memory.address, nbytes)
    engine.run(transfer, PATIENCE_S)
    return ctypes.string_at(memory.address, nbytes)


def tell(**facts: object) -> None:
    """The script's answer to the test: its last line."""
    print(json.dumps(facts), flush=True)
