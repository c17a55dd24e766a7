"""The engine `spdk` when the drive fails, hangs, is reset, or goes away."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from engines.spdk.target import Target, target_fixture, wait_until_back
from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.spdk.engine import SpdkEngine
from spdk_kv.errors import ClosedError, DeviceError, DeviceGone, DeviceTimeout, SpdkKvError
from spdk_kv.testing import SMALL, address_of, memory, read, write
from support.waiting import PATIENCE_S, wait_until

MIB = 1 << 20
TRANSPORTS = ("vfiouser", "tcp")
SLOW_S = 4.0
# NVMe's opcodes, and a status of its own (NVM Command Set 1.0, figure 22; Base 2.0, figure 98).
READ_OPCODE = 2
UNRECOVERED_READ_ERROR = {"sct": 2, "sc": 0x81}
target = target_fixture


def fill(target: Target) -> None:
    target.add_namespace(16 * MIB, 4096)
    target.add_namespace(16 * MIB, 512)
    target.add_namespace(16 * MIB, 4096, delay_s=SLOW_S)
    target.listen()


@pytest.fixture(scope="module", autouse=True)
def namespaces(target: Target) -> None:
    fill(target)


def opened(target: Target, transport: str, nsid: int = 1, depth: int = 4) -> SpdkEngine:
    options = QueueOptions(depth=depth, segment_nbytes=SMALL.segment_nbytes)
    engine = open_engine(parse_location(target.uri(transport, nsid)), options=options)
    assert isinstance(engine, SpdkEngine)
    return engine


@pytest.fixture(params=TRANSPORTS)
def engine(request: pytest.FixtureRequest, target: Target) -> Iterator[SpdkEngine]:
    engine = opened(target, request.param)
    yield engine
    engine.close()


def started(
    engine: SpdkEngine, into: np.ndarray, op: int = READ, timeout_s: float = 30.0
) -> Transfer:
    transfer = engine.transfer(op)
    transfer.keep(into)
    transfer.add(0, address_of(into), into.nbytes)
    transfer.submit(timeout_s)
    return transfer


def ends(engine: SpdkEngine, transfers: list[Transfer]) -> Counter[str]:
    """How the transfers end: each of them, and soon."""
    found: Counter[str] = Counter()
    for transfer in transfers:
        try:
            engine.wait(transfer)
        except SpdkKvError as failed:
            found[type(failed).__name__] += 1
        else:
            found["done"] += 1
        assert transfer.done
    return found


def wait_until_drained(engine: SpdkEngine) -> None:
    wait_until(lambda: not engine.queue.active, "the drive still holds memory")


def test_a_media_error_names_the_status_and_the_block(engine):
    data = np.random.default_rng(1).bytes(MIB)
    write(engine, 0, data)
    engine._pair.inject_error(READ_OPCODE, count=1, **UNRECOVERED_READ_ERROR)
    with pytest.raises(DeviceError, match=r"Unrecovered Read Error .*02h/81h") as caught:
        read(engine, 3 * 4096, 4096)
    assert "at LBA 3 (offset 12288)" in str(caught.value)
    assert (caught.value.op, caught.value.offset) == ("read", 3 * 4096)
    assert caught.value.status == 0x281
    assert type(caught.value) is DeviceError
    # Its neighbours, and the block itself, are as they were.
    assert read(engine, 0, MIB) == data


def test_a_command_without_an_answer_ends_with_a_reset(engine):
    data = np.random.default_rng(2).bytes(MIB)
    write(engine, 0, data)
    engine._pair.inject_error(
        READ_OPCODE, count=1, do_not_submit=True, timeout_us=10**9, sct=0, sc=7
    )
    into, begun = memory(MIB), time.monotonic()
    with pytest.raises(DeviceTimeout, match="deadline"):
        engine.wait(started(engine, into, timeout_s=0.2))
    # Nobody waits for it any more, but its memory is kept until the reset.
    assert engine.queue.active == 1 or time.monotonic() - begun > 2
    wait_until_drained(engine)
    assert read(engine, 0, MIB) == data


def test_a_late_command_is_aborted_and_others_are_not(target):
    engine, other = opened(target, "tcp", 3), opened(target, "tcp", 1)
    into, elsewhere = memory(4096), memory(MIB)
    late = started(engine, into, timeout_s=0.2)
    with pytest.raises(DeviceTimeout):
        engine.wait(late)
    # An abort does that, before the drive has answered.
    wait_until_drained(engine)
    assert ends(other, [started(other, elsewhere) for _ in range(20)]) == {"done": 20}
    other.close()
    engine.close()


def test_a_reset_under_load_costs_time_and_nothing_else(engine):
    data = np.random.default_rng(3).bytes(4 * MIB)
    write(engine, 0, data)
    into = [memory(4 * MIB) for _ in range(8)]
    for _ in range(4):
        for at in into:
            at[:] = 0
        running = [started(engine, at) for at in into]
        engine._controller.reset()
        assert ends(engine, running) == {"done": len(into)}
        assert all(at.tobytes() == data for at in into)


def test_writes_survive_a_reset(engine):
    for number in range(1, 4):
        source = memory(8 * MIB)
        source[:] = number
        running = [started(engine, source, WRITE)]
        engine._controller.reset()
        assert ends(engine, running) == {"done": 1}
        assert read(engine, 0, source.nbytes) == source.tobytes()


def test_a_reset_reaches_all_namespaces_of_the_controller(target):
    engines = [opened(target, "vfiouser", nsid) for nsid in (1, 2)]
    idle = opened(target, "vfiouser", 1)
    into = [memory(4 * MIB) for _ in engines]
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(engine: SpdkEngine, at: np.ndarray) -> None:
        try:
            while not stop.is_set():
                engine.wait(started(engine, at))
        except BaseException as failed:
            failures.append(failed)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(engines, into, strict=True)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(5):
            engines[0]._controller.reset()
    finally:
        stop.set()
        for worker in workers:
            worker.join(PATIENCE_S)
    assert not failures
    assert len(read(idle, 0, 4096)) == 4096
    for engine in (*engines, idle):
        engine.close()


def test_an_engine_is_closed_under_resets(target):
    keeper = opened(target, "vfiouser", 1)
    stop = threading.Event()

    def reset() -> None:
        while not stop.wait(0.005):  # in between, others get through
            keeper._controller.reset()

    resetting = threading.Thread(target=reset)
    resetting.start()
    try:
        for _ in range(10):
            engine = opened(target, "vfiouser", 2)
            running = [started(engine, memory(MIB)) for _ in range(4)]
            engine.close()
            assert all(transfer.done for transfer in running)
            with pytest.raises(ClosedError):
                engine.transfer(READ)
    finally:
        stop.set()
        resetting.join(PATIENCE_S)
    assert not resetting.is_alive()
    keeper.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_target_killed_amid_a_transfer_and_started_again(target, transport):
    engine = opened(target, transport, 1)
    source = memory(8 * MIB)
    running = [started(engine, source, WRITE) for _ in range(300)]
    target.kill()
    found = ends(engine, running)
    assert set(found) <= {"done", "DeviceGone"}
    assert found["DeviceGone"]
    with pytest.raises(DeviceGone):
        read(engine, 0, 4096)
    assert engine.gone
    with pytest.raises(DeviceGone):
        opened(target, transport)
    target.restart()
    fill(target)
    wait_until_back(lambda: write(engine, 0, b"again"))
    assert read(engine, 0, 5) == b"again"
    assert not engine.gone
    engine.close()


def test_an_engine_is_closed_while_nothing_answers(target):
    for transport in TRANSPORTS:
        engine = opened(target, transport, 1)
        running = [started(engine, memory(MIB)) for _ in range(50)]
        target.kill()
        engine.close()
        assert all(transfer.done for transfer in running)
        target.restart()
        fill(target)


def test_another_namespace_in_its_place_is_not_touched(target):
    engine = opened(target, "tcp", 2)
    write(engine, 0, b"mine")
    target.kill()
    target.restart()
    target.namespaces = 40  # other identities, and the same numbers
    for number in (1, 2):
        target.add_namespace(16 * MIB, 512, nsid=number)
    target.listen()

    def is_found_out() -> bool:
        with pytest.raises(DeviceGone) as caught:
            write(engine, 0, b"lost")
        return "another namespace" in str(caught.value)

    wait_until(is_found_out, "the other namespace is taken for its own")
    engine.close()
    fresh = opened(target, "tcp", 2)
    assert read(fresh, 0, 4096) == bytes(4096)
    fresh.close()
