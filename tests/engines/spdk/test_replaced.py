"""Namespaces that are removed, replaced or formatted under a live connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.spdk.drives import NQN
from engines.spdk.target import Target, target_fixture
from spdk_kv._native.transfer import WRITE
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.spdk.engine import SpdkEngine
from spdk_kv.errors import DeviceError, DeviceGone, StoreMismatch
from spdk_kv.placement.superblock import COPY_OFFSETS, pack, parse
from spdk_kv.testing import SMALL, address_of, memory, read, write
from store.helpers import open_store, payload, version_of
from support.waiting import wait_until

MIB = 1 << 20
NBYTES = 64 * MIB
TRANSPORTS = ("vfiouser", "tcp")
OWN, OTHER, NEIGHBOUR = 1, 2, 3
target = target_fixture


class Bdevs:
    """Files as namespaces, by the number of their identity; attached under any number."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder

    def image(self, number: int) -> Path:
        return self.folder / f"image{number}"

    def create(self, number: int, block_nbytes: int = 4096) -> None:
        if not self.image(number).exists():
            with self.image(number).open("wb") as file:
                file.truncate(NBYTES)
        self.target.rpc(
            "bdev_aio_create",
            name=f"File{number}",
            filename=str(self.image(number)),
            block_size=block_nbytes,
            uuid=f"00000000-0000-4000-8000-{number:012}",
        )

    def delete(self, number: int) -> None:
        self.target.rpc("bdev_aio_delete", name=f"File{number}")

    def attach(self, number: int, nsid: int) -> None:
        namespace = {"bdev_name": f"File{number}", "nsid": nsid}
        self.target.rpc("nvmf_subsystem_add_ns", nqn=NQN, namespace=namespace)

    def detach(self, nsid: int) -> None:
        self.target.rpc("nvmf_subsystem_remove_ns", nqn=NQN, nsid=nsid)

    def is_blank(self, number: int) -> bool:
        return not np.fromfile(self.image(number), np.uint8).any()


@pytest.fixture
def bdevs(target: Target, tmp_path: Path) -> Iterator[Bdevs]:
    found = Bdevs(target, tmp_path)
    for number in (OWN, OTHER, NEIGHBOUR):
        found.create(number)
    found.attach(OWN, 1)
    found.attach(NEIGHBOUR, 2)
    yield found
    for nsid in (1, 2):
        found.detach(nsid)
    for number in (OWN, OTHER, NEIGHBOUR):
        found.delete(number)


@pytest.fixture(scope="module", autouse=True)
def listening(target: Target) -> None:
    target.listen()


def opened(target: Target, transport: str, nsid: int = 1, pairs: int = 1) -> SpdkEngine:
    options = QueueOptions(
        depth=SMALL.depth, segment_nbytes=SMALL.segment_nbytes, queue_pairs=pairs
    )
    engine = open_engine(parse_location(target.uri(transport, nsid)), options=options)
    assert isinstance(engine, SpdkEngine)
    return engine


def refusal(engine: SpdkEngine) -> str:
    """Why the engine refuses to write."""
    with pytest.raises(DeviceGone) as refused:
        write(engine, 0, b"lost" * MIB)
    return str(refused.value)


def is_used_again(engine: SpdkEngine) -> bool:
    """A lost controller (a busy machine's target may be too slow for a reset) is looked for when it
    is next used."""
    with suppress(DeviceGone):
        return bool(read(engine, 0, 1))
    return False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_namespace_that_takes_the_number_is_not_touched(target, bdevs, transport):
    engine, neighbour = opened(target, transport, pairs=2), opened(target, transport, 2)
    write(engine, 0, b"own")
    bdevs.detach(1)
    bdevs.attach(OTHER, 1)
    # The controller tells of the removal and of the addition; between them it is only missing.
    wait_until(lambda: "another namespace now" in refusal(engine))
    for _ in range(4):  # on each queue pair, and again
        with pytest.raises(DeviceGone, match="another namespace now"):
            write(engine, 0, b"lost" * MIB)
        with pytest.raises(DeviceGone, match="another namespace now"):
            read(engine, 0, 4096)
        with pytest.raises(DeviceGone):
            engine.flush()
    write(neighbour, 0, b"neighbour")
    assert read(neighbour, 0, 9) == b"neighbour"
    assert bdevs.is_blank(OTHER)
    # Whoever opens it gets the namespace that is there.
    fresh = opened(target, transport)
    assert read(fresh, 0, 4096) == bytes(4096)
    fresh.close()
    bdevs.detach(1)
    bdevs.attach(OWN, 1)
    wait_until(lambda: is_used_again(engine), "it is not found again")
    assert read(engine, 0, 3) == b"own"
    engine.close()
    neighbour.close()


# What the target has not looked at yet when one namespace takes the other's place is carried out on
# that one: a command has only the number. That is a moment, unless the target gets no time.
@pytest.mark.machine
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_writes_that_are_under_way_while_it_is_replaced(target, bdevs, transport):
    engine = opened(target, transport)
    source = memory(4 * MIB)
    source[:] = 0xBB
    running = []
    for _ in range(16):
        transfer = engine.transfer(WRITE)
        transfer.keep(source)
        transfer.add(0, address_of(source), source.nbytes)
        transfer.submit(30.0)
        running.append(transfer)
    bdevs.detach(1)
    bdevs.attach(OTHER, 1)
    for transfer in running:
        with suppress(DeviceError):
            engine.wait(transfer)
    with pytest.raises(DeviceGone):
        write(engine, 0, b"lost")
    assert bdevs.is_blank(OTHER)
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_namespace_that_was_removed_is_used_again_when_it_is_back(target, bdevs, transport):
    engine = opened(target, transport)
    write(engine, 0, b"own")
    bdevs.detach(1)
    wait_until(lambda: "was removed" in refusal(engine))
    assert engine._pair.presence == "absent"
    bdevs.attach(OWN, 1)
    wait_until(lambda: is_used_again(engine), "it is not found again")
    assert read(engine, 0, 3) == b"own"
    engine.close()


def test_another_block_size_is_another_namespace(target, bdevs, tmp_path):
    uri, index = target.uri("tcp"), tmp_path / "index"
    with open_store(uri, create=True, capacity=None, index_dir=index) as store:
        store.put("key", payload("key", 1))
        store.flush()
        bdevs.detach(1)
        bdevs.delete(OWN)
        bdevs.create(OWN, 512)
        bdevs.attach(OWN, 1)
        with pytest.raises(DeviceGone, match="block size"):
            store.put("key", payload("key", 2))
    before = bdevs.image(OWN).read_bytes()
    with pytest.raises(StoreMismatch, match=r"16384 blocks of 4096 .* 131072 blocks of 512"):
        open_store(uri, capacity=None, index_dir=index)
    assert bdevs.image(OWN).read_bytes() == before
    bdevs.detach(1)
    bdevs.delete(OWN)
    bdevs.create(OWN)
    bdevs.attach(OWN, 1)
    with open_store(uri, capacity=None, index_dir=index) as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 1


def test_a_store_from_before_its_geometry_was_kept_opens_and_gets_it(target, bdevs, tmp_path):
    uri, index = target.uri("tcp"), tmp_path / "index"
    with open_store(uri, create=True, capacity=None, index_dir=index) as store:
        store.put("key", payload("key", 1))
    with bdevs.image(OWN).open("r+b") as image:
        for offset in COPY_OFFSETS:
            image.seek(offset)
            old = parse(image.read(4096))
            assert old.geometry == "16384 blocks of 4096 bytes"
            image.seek(offset)
            image.write(pack(replace(old, geometry="")))
    with open_store(uri, capacity=None, index_dir=index) as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 1
    assert parse(bdevs.image(OWN).read_bytes()[:4096]).geometry == old.geometry
