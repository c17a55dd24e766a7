"""Inside the lab, run by pytest: the engine contract on `ng`, stores on it, and what it refuses.

The drives: LAB-N0 and LAB-N1 (512 and 4096 bytes), LAB-BAD (lost blocks), LAB-META (8 bytes of
metadata to each block).
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from drive import controller_of, give_back, node_of, take  # noqa: E402
from engine import pattern  # noqa: E402

import spdk_kv  # noqa: E402
from spdk_kv._native.transfer import READ  # noqa: E402
from spdk_kv.engines import QueueOptions, open_engine, parse_location  # noqa: E402
from spdk_kv.errors import (  # noqa: E402
    DeviceError,
    EngineUnavailable,
    KeyNotFound,
    StoreLocked,
    StoreMismatch,
)
from spdk_kv.testing import SMALL, EngineContract, Medium, address_of, memory, read, write  # noqa: E402
from store.helpers import (  # noqa: E402
    assert_same,
    check_books,
    open_store,
    payload,
    tensor_of,
    version_of,
)

MIB = 1 << 20
SMALL_NBYTES = 40 * MIB  # of both: SMALL of conftest.py
BLOCK = 4096
DRIVES = {"LAB-N0": 512, "LAB-N1": 4096}
SHAPE = spdk_kv.KVShape(2, 2, 40, torch.float16, 400, batch=1)
_CHILD = f"""
import sys; sys.path[:0] = {[str(HERE.parent.parent), str(HERE.parent.parent.parent)]!r}
import os, signal
from store.helpers import open_store, payload
uri, folder = sys.argv[1:]
"""


class Past(Medium):
    """Looks at the medium through the kernel's disk, past its page cache: passthrough does not
    tell that of its writes."""

    def peek(self, offset: int, nbytes: int) -> bytes:
        first = offset // BLOCK * BLOCK
        length = -(-(offset + nbytes - first) // BLOCK) * BLOCK
        with mmap.mmap(-1, max(BLOCK, length)) as room:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            assert os.preadv(fd, [room], first) == max(BLOCK, length)
            os.close(fd)
            return room[offset - first : offset - first + nbytes]

    def poke(self, offset: int, data: bytes) -> None:
        with mmap.mmap(-1, len(data)) as room:
            room[:] = data
            fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
            assert os.pwritev(fd, [room], offset) == len(data)
            os.close(fd)


def generic(serial: str) -> str:
    """The generic node of the drive."""
    return node_of(serial).replace("/nvme", "/ng")


def opened(serial: str, options: QueueOptions = SMALL):
    return open_engine(parse_location(f"ng://{generic(serial)}"), options=options)


class TestNg(EngineContract):
    @pytest.fixture(params=DRIVES)
    def medium(self, request: pytest.FixtureRequest) -> Iterator[Medium]:
        engine = opened(request.param)
        assert (engine.name, engine.block_nbytes) == ("ng", DRIVES[request.param])
        yield Past(engine, node_of(request.param))
        engine.close()


@pytest.fixture(params=DRIVES)
def blank(request: pytest.FixtureRequest) -> str:
    """The URI of a drive that holds nothing."""
    subprocess.run(["blkdiscard", "-f", node_of(request.param)], check=True)
    return f"ng://{generic(request.param)}"


def test_a_drive_says_what_it_is():
    engine = opened("LAB-N1", QueueOptions())
    found = engine.namespace
    assert (found.serial, found.nsid, engine.capacity_nbytes) == ("LAB-N1", 1, SMALL_NBYTES)
    assert engine.identity.startswith("LAB-N1 ")
    assert engine.identity.endswith(" ns1")
    assert found.volatile_write_cache
    assert not engine.gone
    # MDTS is 512 KiB, and of its pages the queue has segments for 126: so the power of two below.
    assert found.max_transfer_nbytes == 512 << 10
    assert engine.segment_nbytes == 256 << 10
    engine.close()


@pytest.mark.parametrize("serial", DRIVES)
def test_the_largest_commands_carry_scattered_pages(serial):
    """Pages that lie beside each other in memory are one segment; these are made not to."""
    engine = opened(serial, QueueOptions(depth=8, hugepages=False))
    data = pattern(11, 8 * MIB)
    write(engine, MIB, data)
    scattered = memory(len(data) + BLOCK, 4)
    for page in range(0, len(scattered), 2 * BLOCK):
        scattered[page] = 1  # every other page first, so that neighbours come from elsewhere
    transfer = engine.transfer(READ)
    transfer.keep(scattered)
    transfer.add(MIB, address_of(scattered), len(data))
    engine.run(transfer)
    assert scattered[: len(data)].tobytes() == data
    assert engine.stats()["bounced_nbytes"] <= len(data)  # those of the write
    engine.flush()
    engine.close()


def test_the_disk_is_held_meanwhile_and_free_afterwards():
    node = node_of("LAB-N0")
    engine = opened("LAB-N0")
    with pytest.raises(OSError, match="busy"):
        os.open(node, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(StoreLocked, match="in use"):
        opened("LAB-N0")
    for command in (["mkswap", node], ["mkfs.ext4", "-q", "-F", node]):
        assert subprocess.run(command, capture_output=True, check=False).returncode
    engine.close()
    engine.close()
    os.close(os.open(node, os.O_RDONLY | os.O_EXCL))


def test_a_lost_block_is_an_error_with_its_name():
    engine = opened("LAB-BAD", QueueOptions(depth=4, segment_nbytes=64 << 10))
    with pytest.raises(DeviceError, match="Unrecovered Read Error") as failed:
        read(engine, 4096 * 512, 512)  # BAD_BLOCKS of conftest.py
    assert (failed.value.op, failed.value.status) == ("read", 0x281)
    assert failed.value.offset == 4096 * 512
    assert len(read(engine, 4096 * 512 - BLOCK, BLOCK)) == BLOCK
    engine.close()


def test_past_the_end_is_an_error():
    engine = opened("LAB-N0")
    with pytest.raises(DeviceError, match="LBA Out of Range"):
        read(engine, SMALL_NBYTES, BLOCK)
    assert len(read(engine, SMALL_NBYTES - BLOCK, BLOCK)) == BLOCK
    engine.close()


def test_blocks_with_metadata_are_refused():
    assert controller_of("LAB-META") is not None
    (node,) = (Path("/dev") / ng.name for ng in controller_of("LAB-META").glob("ng*n1"))
    with pytest.raises(EngineUnavailable, match=r"8 bytes of metadata.*nvme format"):
        open_engine(parse_location(f"ng://{node}"))


def test_tensors_come_back_and_survive_a_reopen(blank, tmp_path):
    options = {"capacity": None, "index_dir": tmp_path / "index"}
    tensors = {
        f"{dtype} {shape}": tensor_of(dtype, shape)
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool)
        for shape in ((), (7, 33), (3, 5, 4096), (MIB,))
    }
    with pytest.raises(StoreMismatch, match="create=True"):
        open_store(blank, **options)
    with open_store(blank, create=True, **options) as store:
        assert store.engine.name == "ng"
        for key, tensor in tensors.items():
            store.put(key, tensor)
        for key, tensor in tensors.items():
            assert_same(store.get(key), tensor)
        store.delete("torch.bool (7, 33)")
        check_books(store)
    with open_store(blank, **options) as store:
        assert len(store) == len(tensors) - 1
        for key, tensor in tensors.items():
            if key != "torch.bool (7, 33)":
                assert_same(store.get(key), tensor)
        check_books(store)


def test_a_sequence_comes_back(blank, tmp_path):
    options = {"capacity": None, "index_dir": tmp_path / "index"}
    keys, values = (tensor_of(torch.float16, (1, 2, 300, 40), seed) for seed in (1, 2))
    with open_store(blank, create=True, **options) as store:
        sequence = store.sequence("q", SHAPE)
        for layer in range(2):
            for first, last in ((0, 200), (200, 201), (201, 300)):
                sequence.append(layer, keys[:, :, first:last], values[:, :, first:last])
        store.flush()
    with open_store(blank, **options) as store:
        sequence = store.sequence("q", SHAPE)
        for layer in range(2):
            k, v = sequence.read(layer)
            assert_same(k, keys)
            assert_same(v, values)


def test_a_killed_process_loses_nothing_that_was_flushed(tmp_path):
    subprocess.run(["blkdiscard", "-f", node_of("LAB-N1")], check=True)
    uri, folder = f"ng://{generic('LAB-N1')}", tmp_path / "index"
    script = (
        _CHILD
        + """
store = open_store(uri, capacity=None, index_dir=folder, create=True)
for version in range(1, 4):
    for key in "abc":
        store.put(key, payload(key, version, 90_000))
    store.flush()
for key in "abcd":
    store.put(key, payload(key, 4, 90_000))
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    killed = subprocess.run([sys.executable, "-c", script, uri, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    with open_store(uri, capacity=None, index_dir=folder) as store:
        for key in "abc":
            assert version_of(key, store.get(key, as_numpy=True)) in (3, 4)
        with pytest.raises(KeyNotFound):
            store.get("d")
        check_books(store)


def test_a_store_goes_with_its_drive_from_ng_to_spdk_and_back(tmp_path):
    """Same drive, same identity, so the same store, whoever drives it."""
    subprocess.run(["blkdiscard", "-f", node_of("LAB-N0")], check=True)
    options = {"capacity": None, "index_dir": tmp_path / "index"}
    with open_store(f"ng://{generic('LAB-N0')}", create=True, **options) as store:
        store.put("key", payload("key", 1, 300_000))
    address = take("LAB-N0")
    with open_store(f"spdk://{address}/1", **options) as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 1
        store.put("key", payload("key", 2, 300_000))
    give_back(address)
    with open_store(f"ng://{generic('LAB-N0')}", **options) as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 2
