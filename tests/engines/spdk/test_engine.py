"""The engine `spdk` against a real target: the engine contract, over vfio-user and TCP.

What happens when something fails is in test_spdk_faults.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from engines.spdk.target import NQN, SERIAL, Target, target_fixture
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.spdk.engine import SpdkEngine
from spdk_kv.errors import ClosedError, DeviceGone, EngineUnavailable
from spdk_kv.testing import SMALL, EngineContract, Medium, address_of, memory, read, write
from support.waiting import PATIENCE_S

MIB = 1 << 20
TRANSPORTS = ("vfiouser", "tcp")
NAMESPACES = 24
target = target_fixture


@pytest.fixture(scope="module", autouse=True)
def namespaces(target: Target) -> None:
    """Odd ones have blocks of 512 bytes, even ones of 4096."""
    for number in range(NAMESPACES):
        target.add_namespace(8 * MIB, 4096 if number % 2 else 512)
    target.listen()


@pytest.fixture(scope="module", autouse=True)
def connections(target: Target, namespaces: None) -> Iterator[None]:
    """Both controllers stay connected, so that each test's engine is opened quickly."""
    kept = [opened(target, transport, NAMESPACES) for transport in TRANSPORTS]
    yield
    for engine in kept:
        engine.close()


def opened(target: Target, transport: str, nsid: int, options: QueueOptions = SMALL) -> SpdkEngine:
    engine = open_engine(parse_location(target.uri(transport, nsid)), options=options)
    assert isinstance(engine, SpdkEngine)
    return engine


class TestSpdk(EngineContract):
    @pytest.fixture(
        params=[(transport, nsid) for transport in TRANSPORTS for nsid in (1, 2)],
        ids=["vfiouser-512", "vfiouser-4096", "tcp-512", "tcp-4096"],
    )
    def medium(self, request: pytest.FixtureRequest, target: Target) -> Iterator[Medium]:
        """What is written over one transport is looked at over the other: by a second initiator."""
        transport, nsid = request.param
        other = opened(target, TRANSPORTS[transport == "vfiouser"], nsid)
        engine = opened(target, transport, nsid)
        assert engine.block_nbytes == (512, 4096)[nsid - 1]
        yield Medium(engine, "", other)
        engine.close()
        other.close()


def test_a_drive_says_what_it_is(target):
    engine = opened(target, "vfiouser", 2)
    assert engine.controller["serial"] == SERIAL
    assert engine.capacity_nbytes == 8 * MIB
    assert SERIAL in engine.identity
    assert engine.identity.endswith("ns2")
    assert engine.health()["media_errors"] == 0
    assert not engine.gone
    over_tcp = opened(target, "tcp", 2)
    assert over_tcp.identity == engine.identity
    over_tcp.close()
    engine.close()


def test_every_namespace_is_its_own(target):
    engines = [opened(target, TRANSPORTS[n % 2], 1 + n) for n in range(NAMESPACES)]
    for number, engine in enumerate(engines):
        write(engine, 0, bytes([number]) * MIB)
    assert len({engine.identity for engine in engines}) == NAMESPACES
    for number, engine in enumerate(engines):
        assert read(engine, 0, MIB) == bytes([number]) * MIB
        engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_namespaces_of_one_controller_work_at_once(target, transport):
    engines = [opened(target, transport, nsid) for nsid in range(1, 9)]
    patterns = [np.random.default_rng(n).bytes(2 * MIB) for n in range(len(engines))]
    for engine, data in zip(engines, patterns, strict=True):
        write(engine, 0, data)
    into = [memory(2 * MIB) for _ in engines]
    for _ in range(5):
        running = []
        for engine, at in zip(engines, into, strict=True):
            at[:] = 0
            transfer = engine.transfer(READ)
            transfer.keep(at)
            transfer.add(0, address_of(at), 2 * MIB)
            transfer.submit(30.0)
            running.append(transfer)
        for engine, transfer in zip(engines, running, strict=True):
            engine.wait(transfer)
        assert [at.tobytes() for at in into] == patterns
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_thousand_transfers_at_depth_two(target, transport):
    engine = opened(target, transport, 2, QueueOptions(depth=2, segment_nbytes=4096))
    source = memory(1000 * 4096)
    source[:] = np.frombuffer(np.random.default_rng(0).bytes(source.nbytes), np.uint8)
    running = []
    for number in range(1000):
        transfer = engine.transfer(WRITE)
        transfer.keep(source)
        transfer.add(number * 4096, address_of(source) + number * 4096, 4096)
        transfer.submit(30.0)
        running.append(transfer)
    for transfer in running:
        engine.wait(transfer)
    assert read(engine, 0, source.nbytes) == source.tobytes()
    assert engine.stats()["deepest"] == 2
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_commands_larger_than_the_drive_takes_are_split(target, transport):
    engine = opened(target, transport, 1, QueueOptions(depth=4, segment_nbytes=4 * MIB))
    assert engine.namespace["max_transfer_nbytes"] < 4 * MIB
    data = np.random.default_rng(7).bytes(7 * MIB)
    write(engine, 0, data)
    assert read(engine, 0, len(data)) == data
    assert engine.stats()["ios"] == 4
    engine.close()


def test_another_program_reads_the_same_bytes(target, tmp_path):
    engine = opened(target, "vfiouser", 4)
    data = np.random.default_rng(4).bytes(8 * MIB)
    write(engine, 0, data)
    engine.flush()
    engine.close()
    attach = {
        "method": "bdev_nvme_attach_controller",
        "params": {
            "name": "Nvme0",
            "trtype": "TCP",
            "adrfam": "IPv4",
            "traddr": "127.0.0.1",
            "trsvcid": str(target.port),
            "subnqn": NQN,
        },
    }
    settings = tmp_path / "dd.json"
    settings.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": [attach]}]}))
    out = tmp_path / "out"
    words = ["spdk_dd", "--ib", "Nvme0n4", "--of", str(out), "--bs", "1048576", "--count", "8"]
    words += ["--no-huge", "-s", "512", "--no-pci", "-c", str(settings), "-m", "0x1"]
    words += ["--disable-cpumask-locks", "-r", str(tmp_path / "dd.sock")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_bytes() == data


def test_memory_comes_back(target):
    # Each takes 128 MiB of the 512 that there are.
    large = QueueOptions(depth=16, segment_nbytes=4 * MIB)
    for _ in range(8):
        engine = opened(target, "vfiouser", 2, large)
        lease = engine.allocate(32 * MIB)
        assert lease.nbytes == 32 * MIB
        engine.close()
        del lease, engine


def test_what_is_not_there_is_refused(target):
    with pytest.raises(EngineUnavailable, match="no namespace 99; active are: 1, 2"):
        opened(target, "vfiouser", 99)
    for uri in (
        f"spdk+tcp://127.0.0.1:1/{NQN}",
        f"spdk+tcp://127.0.0.1:{target.port}/{NQN}.none/1",
        f"spdk+vfiouser:///nowhere/{NQN}/1",
    ):
        with pytest.raises(DeviceGone, match="doctor"):
            open_engine(parse_location(uri))
    with pytest.raises((DeviceGone, EngineUnavailable), match=r"0000:ff:1f\.7"):
        open_engine(parse_location("spdk://0000:ff:1f.7/1"))
    with pytest.raises(ValueError, match="served by"):
        open_engine(parse_location(target.uri("tcp")), engine="uring")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transfers_are_dealt_out_to_several_queue_pairs(target, transport):
    options = QueueOptions(depth=4, segment_nbytes=64 << 10, queue_pairs=3)
    engine = opened(target, transport, 2, options)
    data = np.random.default_rng(5).bytes(4 * MIB)
    futures, sides = [], []
    for number in range(64):
        side = memory(64 << 10)
        side[:] = np.frombuffer(data[number * len(side) :][: len(side)], np.uint8)
        transfer = engine.transfer(WRITE)
        transfer.keep(side)
        transfer.add(number * len(side), address_of(side), len(side))
        futures.append(engine.start(transfer, lambda done: done.status))
        sides.append(side)
    assert [future.result(PATIENCE_S) for future in futures] == [0] * 64
    engine.flush()
    assert read(engine, 0, len(data)) == data
    assert [lane.stats()["transfers"] > 1 for lane in engine._lanes] == [True, True]
    stats = engine.stats()
    assert stats["written_nbytes"] == len(data)
    assert sum(stats["histogram"].values()) == stats["ios"]
    # What SPDK holds is reached over each of them.
    lease = engine.allocate(64 << 10)
    before = stats["bounced_nbytes"]
    for _ in range(6):
        transfer = engine.transfer(READ)
        transfer.keep(lease)
        transfer.add(0, lease.address, 64 << 10)
        engine.run(transfer)
    assert engine.stats()["bounced_nbytes"] == before
    engine._controller.reset()
    assert read(engine, 0, len(data)) == data
    engine.close()
    with pytest.raises(ClosedError):
        engine.transfer(READ)


def test_several_queue_pairs_are_for_nvme_only(tmp_path):
    with pytest.raises(ValueError, match="engine spdk"):
        open_engine(parse_location("ram://"), options=QueueOptions(queue_pairs=2))
    with pytest.raises(ValueError, match="1 to 64"):
        QueueOptions(queue_pairs=0)
