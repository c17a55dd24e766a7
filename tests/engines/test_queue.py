"""How an engine's queue treats transfers: depth, priorities, threads, futures, cancel, close."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from spdk_kv._native.engines.memory import MemoryBackend
from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.memory import Pool
from spdk_kv._native.transfer import PREFETCH, READ, WRITE, Queue, Transfer
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.errors import ClosedError, DeviceError
from spdk_kv.testing import SMALL, Medium, address_of, memory
from support.media import EVERY, KEEPING, medium
from support.waiting import PATIENCE_S, wait_until

BLOCK = 4096
SEGMENT = SMALL.segment_nbytes


@pytest.fixture(params=KEEPING)
def keeping(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


@pytest.fixture(params=EVERY)
def any_engine(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


def reading(engine, nbytes=BLOCK, pieces=1, into=None):
    """A read of the device's start, and where it goes."""
    into = memory(nbytes) if into is None else into
    transfer = engine.transfer(READ)
    transfer.keep(into)
    for _ in range(pieces):
        transfer.add(0, address_of(into), nbytes)
    return transfer


def long_reading(engine):
    """A read that lasts long enough for a short one to pass it."""
    if engine.keeps_bytes:
        return reading(engine, SEGMENT, 20_000)
    # `null` makes nothing of an address: the read may be as long as it likes.
    transfer = engine.transfer(READ)
    transfer.add(0, 0, 1_000_000 * SEGMENT)
    return transfer


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_the_queue_is_kept_as_deep_as_asked_and_no_deeper(any_engine, depth):
    engine = any_engine.engine
    engine.depth = depth
    assert engine.depth == depth
    engine.run(reading(engine, SEGMENT, 50))
    assert engine.stats()["deepest"] == depth
    with pytest.raises(ValueError, match="depth"):
        engine.depth = 0


def test_a_deep_queue_that_stays_full_mixes_nothing_up(keeping):
    """Where it waits for several commands to end at once."""
    engine, count = keeping.engine, 200
    engine.depth = 64
    data = np.random.default_rng(0).integers(0, 256, (count, BLOCK), np.uint8)
    for number in range(count):
        keeping.poke(number * BLOCK, data[number].tobytes())
    chosen = np.random.default_rng(1).integers(0, count, (2, 3000))
    found = [memory(3000 * BLOCK) for _ in chosen]
    transfers = []
    for blocks, into in zip(chosen, found, strict=True):
        transfer = engine.transfer(READ, checksum=True)
        transfer.keep(into)
        for at, block in enumerate(blocks):
            transfer.add(int(block) * BLOCK, address_of(into) + at * BLOCK, BLOCK)
        transfer.submit()
        transfers.append(transfer)
    for blocks, into, transfer in zip(chosen, found, transfers, strict=True):
        engine.wait(transfer)
        assert (into.reshape(-1, BLOCK) == data[blocks]).all()
    assert engine.stats()["deepest"] >= 32


def test_a_depth_beyond_the_engine_s_own_room_still_works(keeping):
    engine = keeping.engine
    engine.depth = 500
    data = np.random.default_rng(0).integers(0, 256, 400 * BLOCK, np.uint8)
    for shift in (0, 1):  # 1: every segment needs a slot, of which there are 8
        side = memory(len(data), shift)
        side[:] = data
        for op in (WRITE, READ):
            transfer = engine.transfer(op, checksum=True)
            for at in range(0, len(data), BLOCK):
                transfer.add(at, address_of(side) + at, BLOCK)
            engine.run(transfer, timeout_s=PATIENCE_S)
            side[:] = data if op == READ else 0
        assert np.array_equal(side, data)


def one_of(attempts, tries=50):
    """Whether one of a few tries went well: on a busy machine the long read may be over before
    the short one begins, and then the try shows nothing."""
    return any(attempts() for _ in range(tries))


def test_demand_passes_prefetch(any_engine):
    engine = any_engine.engine

    def passes() -> bool:
        ahead, before = long_reading(engine), engine.stats()["ios"]
        ahead.submit(priority=PREFETCH)
        engine.run(reading(engine))
        passed = engine.stats()["ios"] - before < ahead.nbytes // SEGMENT // 2
        ahead.cancel()
        ahead.wait()
        return passed

    assert one_of(passes), "a demand waited for all of a prefetch"


def test_waiting_makes_a_prefetch_a_demand(any_engine):
    engine = any_engine.engine

    def passes() -> bool:
        first, second = long_reading(engine), reading(engine)
        before = engine.stats()["ios"]
        first.submit(priority=PREFETCH)
        second.submit(priority=PREFETCH)
        time.sleep(0.005)  # until the queue has listed it as what it was submitted as
        engine.wait(second)
        passed = engine.stats()["ios"] - before < first.nbytes // SEGMENT // 2
        first.cancel()
        first.wait()
        return passed

    assert one_of(passes), "it stayed behind the prefetch before it"


def test_cancel_stops_what_is_not_yet_submitted(any_engine):
    engine = any_engine.engine

    def stops() -> bool:
        long = long_reading(engine)
        before = engine.stats()["ios"]
        long.submit()
        long.cancel()
        status = long.wait()
        assert long.done
        if not status:
            return False
        assert status == errno.ECANCELED
        assert isinstance(engine.error(long), DeviceError)
        return engine.stats()["ios"] - before < long.nbytes // SEGMENT

    assert one_of(stops)
    before = long_reading(engine)
    before.cancel()
    engine.run(reading(engine))
    before.submit()
    assert before.wait() == errno.ECANCELED
    engine.run(reading(engine))


def test_eight_threads_share_a_queue(keeping):
    engine = keeping.engine
    share, rounds = 128 << 10, 12
    failures: list[str] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(rounds):
                data = rng.integers(0, 256, share - int(rng.integers(0, BLOCK)), np.uint8)
                source = memory(len(data), int(rng.integers(0, 65)))
                source[:] = data
                into = memory(len(data), int(rng.integers(0, 65)))
                for op, side in ((WRITE, source), (READ, into)):
                    transfer = engine.transfer(op, checksum=True)
                    transfer.add(number * share, address_of(side), len(data))
                    if rng.integers(0, 2):
                        engine.run(transfer)
                    else:
                        transfer.submit()
                        engine.wait(transfer)
                if not np.array_equal(into, data):
                    failures.append(f"thread {number} read other bytes")
        except Exception as failure:
            failures.append(repr(failure))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert engine.stats()["transfers"] == 8 * rounds * 2
    assert engine.queue.active == 0


def test_futures_carry_results_and_exceptions(any_engine):
    engine = any_engine.engine
    futures = [engine.start(reading(engine), lambda t: t.status) for _ in range(200)]
    assert [future.result(PATIENCE_S) for future in futures] == [0] * 200

    def fail(_):
        raise KeyError("mine")

    failing = engine.start(reading(engine), fail)
    with pytest.raises(KeyError, match="mine"):
        failing.result(PATIENCE_S)
    assert (
        engine.start(reading(engine), lambda t: t.done, priority=PREFETCH).result(PATIENCE_S)
        is True
    )


def test_what_expires_and_then_ends_is_reaped_once(any_engine):
    engine = any_engine.engine
    late = reading(engine, SEGMENT, 50)
    late.submit(1e-9, notify=True)
    wait_until(lambda: late.done)
    assert late.status == errno.ETIMEDOUT
    assert engine.queue.reap() == [late]


def test_an_exclusive_queue_takes_one_transfer_at_a_time():
    backend, link = MemoryBackend(0), EmulatedLink(50e9)
    slot, into = memory(BLOCK), memory(BLOCK)
    queue = Queue(
        backend.backend,
        (backend, slot),
        depth=1,
        segment_nbytes=BLOCK,
        block_nbytes=1,
        align_nbytes=1,
        slots=[address_of(slot)],
        pid=os.getpid(),
        exclusive=True,
    )
    first, refused, later = (Transfer(queue, READ, link=link) for _ in range(3))
    for transfer in (first, refused, later):
        transfer.keep(into)
        transfer.add(0, address_of(into), BLOCK)
    link.pause()
    first.submit()
    with pytest.raises(ClosedError):
        refused.submit()
    link.resume()
    assert first.wait() == 0
    assert later.run() == 0
    assert queue.close()


class Kept:
    """Something whose end can be seen."""


def test_what_a_transfer_keeps_goes_when_it_is_over(any_engine):
    engine = any_engine.engine
    for how in ("run", "start", "dropped"):
        kept = Kept()
        gone = weakref.ref(kept)
        transfer = reading(engine)
        transfer.keep(kept)
        del kept
        if how == "run":
            engine.run(transfer)
        elif how == "start":
            engine.start(transfer, lambda _: None).result(PATIENCE_S)
            del transfer  # the reaper must not be the one that still holds it
        else:
            transfer.submit()
            del transfer
        wait_until(lambda gone=gone: gone() is None, f"{how}: it is still there")


def test_memory_dropped_in_flight_is_not_reused_before_its_time(keeping):
    """The device would write into somebody else's lease."""
    engine = keeping.engine
    keeping.poke(0, b"\xff" * SEGMENT)
    pool = Pool(engine.allocate, 1 << 20)
    # Held from the start, with the pool's memory all around what is dropped.
    guards = [pool.lease(SEGMENT) for _ in range(40)]
    for guard in guards[::2]:
        np.frombuffer(guard, np.uint8)[:] = 0
    del guards[1::2]
    for round_ in range(1200):
        lease = pool.lease(SEGMENT)
        transfer = reading(engine, SEGMENT, 1, np.frombuffer(lease, np.uint8))
        transfer.submit(priority=round_ % 2)
        del transfer, lease
        if round_ % 100 == 0:
            gc.collect()
        fresh = pool.lease(SEGMENT)
        view = np.frombuffer(fresh, np.uint8)
        view[::512] = 7
        if round_ % 20 == 0:
            engine.run(reading(engine))
            assert set(view[::512].tolist()) == {7}, "a read landed in another's lease"
        del view, fresh
    engine.run(reading(engine))
    assert all(not np.frombuffer(guard, np.uint8).any() for guard in guards)
    del guard, guards
    engine.close()
    assert pool.leased_nbytes == 0


def test_a_closed_engine_says_so(any_engine):
    engine = any_engine.engine
    built = reading(engine)
    engine.start(reading(engine), lambda _: None).result(PATIENCE_S)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.transfer(READ),
        lambda: engine.run(built),
        lambda: engine.start(built, lambda _: None),
        engine.flush,
        lambda: engine.discard(0, BLOCK),
        engine.stats,
        lambda: engine.depth,
    ):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize("kind", EVERY)
def test_closing_waits_for_what_is_in_flight_and_refuses_the_rest(kind, tmp_path):
    for _ in range(20):
        with medium(kind, tmp_path) as found:
            engine = found.engine
            outcomes: list[str] = []

            def work(engine=engine, outcomes=outcomes) -> None:
                try:
                    while True:
                        engine.run(reading(engine, SEGMENT, 5))
                except ClosedError:
                    outcomes.append("closed")
                except BaseException as failure:
                    outcomes.append(repr(failure))

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            future = engine.start(reading(engine, SEGMENT, 500), lambda t: t.status)
            time.sleep(0.002)
            engine.close()
            assert future.result(0) == 0
            for thread in threads:
                thread.join(PATIENCE_S)
            assert outcomes == ["closed"] * 3
        (tmp_path / "medium.img").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", [kind for kind in KEEPING if kind.endswith("-loop")])
def test_a_closed_device_can_be_opened_again_at_once(kind, tmp_path):
    """It is open exclusively: whatever lingered would refuse the next one."""
    with medium(kind, tmp_path) as found:
        path = found.path
        for _ in range(20):
            found.engine.run(reading(found.engine, SEGMENT, 8))
            found.engine.close()
            location = parse_location(f"block://{path}")
            found.engine = open_engine(location, path, engine=found.engine.name, options=SMALL)
        found.engine.close()


def test_a_piece_of_nothing_reads_nothing_wherever_it_begins(keeping):
    into = memory(BLOCK)
    for offset in (0, 5, BLOCK - 1):
        transfer = reading(keeping.engine, into=into)
        transfer.add(offset, address_of(into), 0)
        keeping.engine.run(transfer, 10)


def test_blocks_and_alignment_are_powers_of_two():
    backend = MemoryBackend(0)
    for block_nbytes, align_nbytes in ((3 * 512, 1), (512, 12)):
        with pytest.raises(ValueError, match="powers of two"):
            Queue(
                backend.backend,
                backend,
                depth=1,
                segment_nbytes=3 * 4096,
                block_nbytes=block_nbytes,
                align_nbytes=align_nbytes,
                slots=[4096],
                pid=os.getpid(),
            )


def test_many_pieces_of_which_the_device_reaches_but_some(keeping):
    """One answer for all of them would be wrong here."""
    engine = keeping.engine
    own = [engine.allocate(4 * BLOCK) for _ in range(3)]
    foreign = memory(4 * BLOCK, 1)
    data = np.random.default_rng(3).integers(0, 256, 16 * BLOCK, np.uint8)
    places = [own[1].address, address_of(foreign), own[0].address, own[2].address]
    sizes = np.full(4, 4 * BLOCK, np.uint64)
    offsets = np.arange(4, dtype=np.uint64) * np.uint64(4 * BLOCK)
    write = engine.transfer(WRITE)
    write.keep(data)
    write.add(0, address_of(data), len(data))
    engine.run(write)
    read = engine.transfer(READ)
    read.keep((own, foreign))
    read.add_many(offsets, np.array(places, np.uint64), sizes)
    engine.run(read)
    for index, place in enumerate(places):
        seen = ctypes.string_at(place, 4 * BLOCK)
        assert seen == data[index * 4 * BLOCK : (index + 1) * 4 * BLOCK].tobytes(), index
