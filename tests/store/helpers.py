"""What the store's tests share: small stores, self-describing payloads, equal bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spdk_kv
from engines.spdk import drives
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.store import KVStore
from spdk_kv.testing import read, write
from support.options import grouped
from support.waiting import PATIENCE_S, PROCESS_PATIENCE_S

FILE_ENGINES = ("uring", "threads", "pagecache")
DATA_START = 1 << 20

# Quick to open: little memory to register, and no thread that flushes on its own.
SMALL: dict[str, Any] = {
    "depth": 4,
    "segment": "64 KiB",
    "staging": "8 MiB",
    "flush_interval_s": None,
}


@pytest.fixture
def folder_fixture() -> Iterator[Path]:
    """A place for stores, gone after the test: a data file of 256 MiB is too much to be kept."""
    path = Path(tempfile.mkdtemp(prefix="spdk_kv-test-"))
    yield path
    shutil.rmtree(path)


def open_store(where: Path | str, **options: Any) -> KVStore:
    """A small store in a folder, or at a URI; ``options`` are flat, see :func:`grouped`. With a
    target in the environment (drives.py) a folder gets the index, and a namespace of the target
    the data."""
    wanted = SMALL | {"capacity": "16 MiB"} | options
    if drives.in_use() and "://" not in str(where):
        return spdk_kv.open(**grouped(drives.instead_of(Path(where), wanted)))
    location = where if isinstance(where, str) else f"file://{where}"
    return spdk_kv.open(location, **grouped(wanted))


def reopen(where: Path | str, **options: Any) -> KVStore:
    """As :func:`open_store`, with the capacity that it has."""
    return open_store(where, capacity=None, **options)


# -- payloads -------------------------------------------------------------------------------------

_HEAD = struct.Struct("<IIQ")  # CRC of the key, length, version


def payload(key: str, version: int, nbytes: int = 5000) -> np.ndarray:
    """Bytes that say whose they are, and of which version; no two payloads have equal blocks."""
    head = _HEAD.pack(zlib.crc32(key.encode("utf-8", "surrogatepass")), nbytes, version)
    seed = int.from_bytes(hashlib.sha256(head).digest()[:8], "little")
    body = np.random.Generator(np.random.SFC64(seed)).bytes(nbytes - len(head))
    return np.frombuffer(head + body, np.uint8)


def version_of(key: str, found: Any) -> int:
    """Which version of ``key`` the bytes are; an assertion fails where they are not all of one."""
    found = np.asarray(found)
    _, nbytes, version = _HEAD.unpack(found[: _HEAD.size].tobytes())
    assert nbytes == found.nbytes
    expected = payload(key, version, nbytes)
    assert found.tobytes() == expected.tobytes(), f"{key}: not the bytes of any put"
    return int(version)


# -- bytes ----------------------------------------------------------------------------------------


def bytes_of(tensor: Any) -> bytes:
    """The elements of a tensor or array in C order, as bytes."""
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    if plain.element_size() == 1:
        plain = plain.view(torch.uint8)  # torch moves not every dtype of a byte
    plain = plain.contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(found: Any, expected: Any) -> None:
    """Same dtype, shape and bytes."""
    assert str(found.dtype).removeprefix("torch.") == str(expected.dtype).removeprefix("torch.")
    assert tuple(found.shape) == tuple(expected.shape)
    assert bytes_of(found) == bytes_of(expected)


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Random bytes."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8))


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits; of bool, random truth."""
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    raw = noise(count * dtype.itemsize, seed)
    if dtype == torch.bool:
        raw = raw & 1
    return raw.view(dtype).view(shape)


def extent_of(store: KVStore, key: str) -> tuple[int, int]:
    """Where a blob lies in the data file: offset, bytes."""
    record = store.catalog.records.blobs[key]
    return record.offset, record.nbytes


def flip(path: Path | str, offset: int, mask: int = 1) -> None:
    """Changes bits of one byte of a file, behind everybody's back; of a store's data file, where
    those are drives, of that drive."""
    if drives.in_use() and Path(path).name == "data":
        engine = open_engine(parse_location(drives.uri_of(Path(path).parent)))
        block = bytearray(read(engine, offset // 4096 * 4096, 4096))
        block[offset % 4096] ^= mask
        write(engine, offset // 4096 * 4096, bytes(block))
        engine.close()
        return
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_books(store: KVStore) -> None:
    """The allocator's books are right, and hold exactly what the records name."""
    catalog = store.catalog
    deadline = time.monotonic() + PATIENCE_S
    store.flush()
    # Writes that were cut short:
    while not catalog.quarantine.is_empty and time.monotonic() < deadline:
        time.sleep(0.001)
        store.flush()
    allocator = catalog.records.extents.allocator
    allocator.check()
    named = {blob.offset for blob in catalog.records.blobs.values() if blob.nbytes}
    for record in catalog.records.sequences.values():
        named |= {run for piece in record.pieces for run in piece.runs}
    for sequence in store._sequences.open_sequences():
        named |= {run for held in sequence._growth.pieces for run in held.piece.runs}
    with catalog.records.lock:
        assert set(allocator._used) - catalog.reserved.offsets == named


# -- other processes ------------------------------------------------------------------------------


def python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a new interpreter; its ``sys.argv[1:]`` are ``arguments``."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PROCESS_PATIENCE_S, **options
    )


def kill_loop(folder: Path, kills: int, what: str, seed: int) -> dict[str, int]:
    """Runs killing.py on ``folder``: kills at every stage. What it counted."""
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(folder), str(kills), str(seed), what]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)
