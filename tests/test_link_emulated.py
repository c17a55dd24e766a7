"""Transfers over the emulated link: exact bytes, failures, hangs, and what happens around them."""

from __future__ import annotations

import errno
import gc
import threading
import time
import weakref
from collections.abc import Iterator

import blockdev
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media import EVERY, KEEPING, SMALL, Medium, address_of, medium, memory
from subprocesses import run_script

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.emulated_link import EmulatedLink
from spdk_kv._native.memory import Pool
from spdk_kv._native.transfer import DISCARD, FLUSH, PREFETCH, READ, WRITE
from spdk_kv.engines import EngineOptions, open_engine, parse_location
from spdk_kv.errors import ClosedError, DeviceError, DeviceTimeout

BLOCK = 4096
MIB = 1 << 20
SEGMENT = SMALL.segment_nbytes
FAST = 50e9


@pytest.fixture(params=[k for k in KEEPING if not k.endswith("partition")])
def keeping(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def ram(tmp_path) -> Iterator[Medium]:
    with medium("ram", tmp_path) as found:
        yield found


def noise(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def over(engine, link, op, offset, view, **options):
    """A transfer of ``view``, which stands for memory on a GPU."""
    transfer = engine.transfer(op, link=link, **options)
    transfer.keep(view)
    transfer.add(offset, address_of(view), len(view))
    return transfer


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    offset=st.integers(0, 3 * SEGMENT),
    nbytes=st.integers(1, 9 * SEGMENT),
    shift=st.integers(0, 100),
    segment=st.sampled_from([0, BLOCK, 3 * BLOCK, SEGMENT]),
    window=st.integers(0, 9),
    checksum=st.booleans(),
)
def test_reads_bring_exactly_their_bytes(
    keeping, offset, nbytes, shift, segment, window, checksum
) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    data = noise(12 * SEGMENT)
    if not keeping.engine.stats()["written_nbytes"]:
        engine.run(over(engine, None, WRITE, 0, data))
    around = np.full(nbytes + 200, 0xEE, np.uint8)
    view = around[shift : shift + nbytes]
    transfer = over(
        engine, link, READ, offset, view, checksum=checksum, segment_nbytes=segment, window=window
    )
    engine.run(transfer, timeout_s=30)
    wanted = data[offset : offset + nbytes]
    assert np.array_equal(view, wanted)
    assert set(around[:shift]) | set(around[shift + nbytes :]) <= {0xEE}
    if checksum:
        assert transfer.crc() == crc32c(wanted)


@pytest.mark.parametrize("segment", [0, BLOCK, 5 * BLOCK])
@pytest.mark.parametrize("nbytes", [1, BLOCK - 1, SEGMENT, 7 * SEGMENT + 13, 3 * MIB + 1])
def test_writes_put_exactly_their_bytes_and_zeros_to_the_end_of_the_block(
    keeping, nbytes, segment
) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST, 1e-6)
    keeping.poke(0, b"\xee" * (4 * MIB))
    data = noise(nbytes + 1, nbytes)[1:]
    transfer = over(engine, link, WRITE, BLOCK, data, checksum=True, segment_nbytes=segment)
    engine.run(transfer, timeout_s=30)
    engine.flush()
    end = -(-nbytes // engine.block_nbytes) * engine.block_nbytes
    seen = keeping.peek(0, 4 * MIB)
    assert seen[BLOCK : BLOCK + nbytes] == data.tobytes()
    assert not any(seen[BLOCK + nbytes : BLOCK + end])
    assert set(seen[:BLOCK]) | set(seen[BLOCK + end :]) == {0xEE}
    assert transfer.crc() == crc32c(data)
    assert link.stats()["from_device_nbytes"] == nbytes


@pytest.mark.parametrize("op", [READ, WRITE])
def test_sums_by_chunk_are_those_of_the_bytes(keeping, op) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    data = noise(6 * SEGMENT + 777)
    engine.run(over(engine, None, WRITE, 0, data))
    view = data.copy() if op == WRITE else np.zeros_like(data)
    transfer = over(
        engine, link, op, 0, view, checksum=True, chunk_nbytes=BLOCK, segment_nbytes=2 * BLOCK
    )
    engine.run(transfer)
    sums = np.frombuffer(transfer.chunk_crcs(), "<u4")
    assert sums.tolist() == [crc32c(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    assert np.array_equal(view, data)


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("number", [1, 7, 60])
def test_a_copy_that_fails_fails_the_transfer_and_the_next_one_is_well(
    keeping, op, at_once, number
) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    data = noise(3 * MIB)
    engine.run(over(engine, None, WRITE, 0, data))
    view = np.zeros_like(data)
    link.fail(number, at_once=at_once)
    words = "refused" if at_once else "on its way"
    with pytest.raises(DeviceError, match=f"{'from' if op == WRITE else 'to'} the GPU.*{words}"):
        engine.run(over(engine, link, op, 4 * MIB if op == WRITE else 0, view, checksum=True))
    for _ in range(3):  # no slot was lost
        engine.run(over(engine, link, READ, 0, view))
        assert np.array_equal(view, data)


class Kept:
    """Something whose end can be seen."""


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_deadline_passes_while_a_copy_hangs_and_memory_stays_out_of_use(keeping, op) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    pool = Pool(engine.allocate, 0)
    lease, kept = pool.lease(2 * MIB), Kept()
    held, alive = lease.capacity, weakref.ref(kept)
    view = np.frombuffer(lease, np.uint8)
    view[:] = 0x77
    transfer = over(engine, link, op, 0, view)
    transfer.keep(kept)
    link.pause()
    began = time.monotonic()
    with pytest.raises(DeviceTimeout, match="deadline"):
        engine.run(transfer, timeout_s=0.2)
    assert time.monotonic() - began < 10
    assert transfer.in_flight
    assert not transfer.done
    del transfer, lease, view, kept
    gc.collect()
    # What needs no slot goes on; what needs one waits for its own deadline.
    engine.run(without_a_slot(engine), timeout_s=30)
    with pytest.raises(DeviceTimeout):
        engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)), timeout_s=0.1)
    assert pool.leased_nbytes == held
    assert alive() is not None
    link.resume()
    until = time.monotonic() + 20
    while alive() is not None and time.monotonic() < until:
        engine.run(without_a_slot(engine))
        time.sleep(0.005)
    assert alive() is None
    assert pool.leased_nbytes == 0
    view = np.zeros(3 * MIB, np.uint8)
    engine.run(over(engine, link, READ, 0, view), timeout_s=30)
    engine.run(over(engine, link, WRITE, 0, view), timeout_s=30)


def without_a_slot(engine):
    """A read into memory that the device reaches by itself."""
    return over(engine, None, READ, 0, memory(BLOCK))


def test_after_a_deadline_what_lands_is_not_copied(tmp_path) -> None:
    with blockdev.hung_device(tmp_path, 8 * MIB) as device:
        location = parse_location(f"block://{device.node}")
        engine = open_engine(location, device.node, engine="threads", options=SMALL)
        link = EmulatedLink(FAST)
        engine.run(over(engine, link, WRITE, 0, np.full(MIB, 0x61, np.uint8)))
        source = np.full(MIB, 0x62, np.uint8)
        device.freeze()
        with pytest.raises(DeviceTimeout):
            engine.run(over(engine, link, WRITE, 0, source), timeout_s=0.2)
        device.thaw()
        view = np.zeros(MIB, np.uint8)
        engine.run(over(engine, link, READ, 0, view), timeout_s=30)
        assert set(view.tolist()) <= {0x61, 0x62}
        engine.close()


def test_a_cancelled_read_copies_no_more_and_ends(keeping) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    link.pause()
    transfer = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
    transfer.submit()
    until = time.monotonic() + 20
    while not link.stats()["copies"] and time.monotonic() < until:
        time.sleep(0.001)
    transfer.cancel()
    link.resume()
    assert transfer.wait() == errno.ECANCELED
    assert transfer.done
    assert 0 < link.stats()["to_device_nbytes"] < 4 * MIB


def test_a_demand_read_passes_a_prefetch_that_waits_for_slots(tmp_path) -> None:
    with medium("ram", tmp_path) as found:
        engine, link = found.engine, EmulatedLink(100e6)
        prefetch = over(engine, link, READ, 0, np.zeros(8 * MIB, np.uint8))
        prefetch.submit(priority=PREFETCH)
        engine.run(over(engine, link, READ, 0, np.zeros(BLOCK, np.uint8)), timeout_s=30)
        assert not prefetch.done
        # And one that needs no slot does not wait for one.
        engine.run(without_a_slot(engine), timeout_s=30)
        assert not prefetch.done
        assert prefetch.wait() == 0


def test_a_window_bounds_what_is_outstanding(keeping) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    before = engine.stats()["deepest"]
    assert before <= 1
    engine.run(over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8), window=2))
    assert engine.stats()["deepest"] <= 2


def test_many_threads_both_ways_at_once(keeping) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST, 1e-6)
    outcomes: list[object] = []

    def work(number: int) -> None:
        try:
            at = number * MIB
            data = noise(MIB, number)
            into = np.zeros(MIB, np.uint8)
            for turn in range(15):
                put = over(engine, link, WRITE, at, data, checksum=True)
                engine.run(put, timeout_s=60)
                into[:] = 0
                got = over(engine, link if turn % 3 else None, READ, at, into, checksum=True)
                engine.run(got, timeout_s=60)
                outcomes.append(np.array_equal(into, data) and got.crc() == put.crc())
        except Exception as failure:
            outcomes.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert outcomes == [True] * 90
    stats = engine.stats()
    assert stats["to_device_nbytes"] == 60 * MIB
    assert stats["from_device_nbytes"] == 90 * MIB


def test_two_links_at_once(ram) -> None:
    engine = ram.engine
    slow, fast = EmulatedLink(200e6), EmulatedLink(FAST)
    data = noise(2 * MIB)
    engine.run(over(engine, fast, WRITE, 0, data))
    views = [np.zeros_like(data) for _ in range(4)]
    made = [
        over(engine, link, READ, 0, view)
        for link, view in zip([slow, fast, slow, fast], views, strict=True)
    ]
    for transfer in made:
        transfer.submit()
    assert [transfer.wait() for transfer in made] == [0] * 4
    assert all(np.array_equal(view, data) for view in views)


@pytest.mark.parametrize("kind", EVERY)
def test_every_engine_serves_a_link_and_futures_come(kind, tmp_path) -> None:
    with medium(kind, tmp_path) as found:
        engine, link = found.engine, EmulatedLink(FAST)
        views = [np.zeros(MIB + 5, np.uint8) for _ in range(6)]
        futures = [
            engine.start(over(engine, link, op, 0, view, checksum=True), lambda t: t.status)
            for view, op in zip(views, [READ, WRITE] * 3, strict=True)
        ]
        assert [future.result(60) for future in futures] == [0] * 6
        assert engine.stats()["copies"] > 0


def test_outcomes_tell_what_a_transfer_took_or_added(ram) -> None:
    engine, link = ram.engine, EmulatedLink(1e9)
    view = np.zeros(4 * MIB, np.uint8)
    for plan in (0, 7):
        engine.run(over(engine, link, READ, 0, view, plan=plan))
    count, seen = engine.queue.outcomes(0)
    assert count == 1
    assert [outcome[:2] for outcome in seen] == [(7, 4 * MIB)]
    assert seen[0][2] >= 0.9 * 4 * MIB, "faster than its link"
    link.fail()
    with pytest.raises(DeviceError):
        engine.run(over(engine, link, READ, 0, view, plan=8))
    made = [over(engine, link, READ, 0, view, plan=plan) for plan in (9, 10)]
    began = time.monotonic_ns()
    for transfer in made:
        transfer.submit()
    for transfer in made:
        engine.wait(transfer)
    elapsed = time.monotonic_ns() - began
    count, seen = engine.queue.outcomes(count)
    assert [outcome[0] for outcome in seen] == [9, 10], "one that failed says nothing"
    assert sum(outcome[2] for outcome in seen) <= elapsed
    assert engine.queue.outcomes(count) == (count, [])
    for _ in range(300):
        engine.run(over(engine, link, READ, 0, view[:4096], plan=11))
    assert len(engine.queue.outcomes(0)[1]) == 256


def test_dropped_transfers_land_and_their_memory_goes_after_that(ram) -> None:
    engine, link = ram.engine, EmulatedLink(FAST)
    ram.poke(0, b"\xff" * SEGMENT)
    pool = Pool(engine.allocate, 1 << 20)
    guards = [pool.lease(SEGMENT) for _ in range(20)]
    for guard in guards:
        np.frombuffer(guard, np.uint8)[:] = 0
    del guards[1::2]
    for round_ in range(400):
        lease = pool.lease(SEGMENT)
        transfer = over(engine, link, READ, 0, np.frombuffer(lease, np.uint8))
        transfer.submit(priority=round_ % 2)
        del transfer, lease
        fresh = pool.lease(SEGMENT)
        view = np.frombuffer(fresh, np.uint8)
        view[::512] = 7
        if round_ % 20 == 0:
            engine.run(over(engine, link, READ, 0, np.zeros(SEGMENT, np.uint8)))
            assert set(view[::512].tolist()) == {7}, "a copy landed in another's lease"
        del view, fresh
    gone = weakref.ref(link)
    del link
    engine.run(without_a_slot(engine))
    assert all(not np.frombuffer(guard, np.uint8).any() for guard in guards[:-1])
    engine.close()
    del engine, ram.engine, guard, guards
    gc.collect()
    assert gone() is None, "the link outlives what used it"


def test_closing_waits_for_copies_and_says_when_one_hangs(tmp_path) -> None:
    with medium("ram", tmp_path) as found:
        engine, link = found.engine, EmulatedLink(200e6)
        transfer = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
        transfer.submit()
        engine.close()
        assert transfer.done
        assert transfer.status == 0
        with pytest.raises(ClosedError):
            engine.transfer(READ, link=link)


def test_closing_while_a_copy_hangs_lets_everybody_go() -> None:
    printed = run_script("""
        import gc, threading, time
        import numpy as np
        from test_link_emulated import *
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=MIB,
                             options=SMALL)
        link = EmulatedLink(FAST)
        link.pause()
        outcomes = []
        def wait():
            try:
                engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)))
            except DeviceTimeout:
                outcomes.append("timeout")
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        try:
            engine.close(timeout_s=0.3)
        except DeviceTimeout as failure:
            print(failure)
        thread.join(10)
        print(outcomes)
    """)
    assert printed.splitlines() == ["ram:// still holds memory 0.3 s after close", "['timeout']"]


EXITS = """
    import os, sys, threading
    import numpy as np
    from test_link_emulated import *
    engine = open_engine(parse_location("{name}://"), engine="{name}", capacity_nbytes=8 * MIB,
                         options=SMALL)
    link = EmulatedLink(200e6)
    made = [over(engine, link, op, 0, np.zeros(4 * MIB, np.uint8)) for op in (READ, WRITE)]
    for transfer in made:
        transfer.submit()
    thread = threading.Thread(target=made[0].wait, daemon=True)
    thread.start()
    {how}
"""


@pytest.mark.parametrize("how", ["pass", "del made", "sys.exit(0)", "link.pause()"])
@pytest.mark.parametrize("name", ["ram", "null"])
def test_the_interpreter_may_exit_in_mid_copy(how, name) -> None:
    assert run_script(EXITS.format(how=how, name=name)) == ""


def test_a_forked_child_is_refused() -> None:
    run_script("""
        import os
        import numpy as np
        from test_link_emulated import *
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=8 * MIB,
                             options=SMALL)
        link = EmulatedLink(500e6)
        flying = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
        flying.submit()
        child = os.fork()
        if child == 0:
            try:
                engine.transfer(READ, link=link)
            except ClosedError:
                del flying, engine, link
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert flying.wait() == 0
    """)


def test_ctrl_c_comes_out_of_a_wait_for_a_copy() -> None:
    printed = run_script("""
        import signal, threading, time
        import numpy as np
        from test_link_emulated import *
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=8 * MIB,
                             options=SMALL)
        link = EmulatedLink(FAST)
        link.pause()
        transfer = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        try:
            engine.run(transfer)
        except KeyboardInterrupt:
            print("interrupted", transfer.in_flight)
        signal.setitimer(signal.ITIMER_REAL, 0)
        link.resume()
        while transfer.in_flight:
            time.sleep(0.001)
        engine.close()
        print("closed")
    """)
    assert printed.split() == ["interrupted", "True", "closed"]


def test_what_cannot_go_over_a_link_is_refused(ram) -> None:
    engine, link = ram.engine, EmulatedLink(FAST)
    for op in (FLUSH, DISCARD):
        with pytest.raises(ValueError, match="reads and writes"):
            engine.transfer(op, link=link)
    with pytest.raises(ValueError, match="handed over"):
        engine.transfer(READ, link=link, hand_over=True, stream=0)
    with pytest.raises(ValueError, match="handed over"):
        engine.transfer(READ, hand_over=True, stream=0)
    with pytest.raises(ValueError, match="at most"):
        engine.transfer(READ, segment_nbytes=2 * SEGMENT)
    with pytest.raises(ValueError, match="chunks"):
        engine.transfer(READ, chunk_nbytes=2 * BLOCK, segment_nbytes=3 * BLOCK)
    for speed, latency in ((0, 0), (-1, 0), (float("nan"), 0), (1e9, -1), (1e9, 2)):
        with pytest.raises(ValueError, match="link of"):
            EmulatedLink(speed, latency)


def test_a_link_takes_the_time_it_says() -> None:
    link = EmulatedLink(1e9, 1e-3)
    assert link.copy_time_s(2_000_000) == pytest.approx(3e-3)
    source, to = noise(2 * MIB), np.zeros(2 * MIB, np.uint8)
    began = time.monotonic()
    link.copy(address_of(to), address_of(source), 2 * MIB)
    assert time.monotonic() - began >= link.copy_time_s(2 * MIB)
    assert np.array_equal(to, source)
    link.fail()
    with pytest.raises(OSError, match="on its way"):
        link.copy(address_of(to), address_of(source), 5, to_device=False)
    still = EmulatedLink(FAST, moves=False)
    to[:] = 0
    still.copy(address_of(to), address_of(source), 2 * MIB)
    assert not to.any()


def test_slots_are_taken_when_a_link_is_first_used(tmp_path) -> None:
    options = EngineOptions(depth=3, segment_nbytes=BLOCK, hugepages=False)
    with medium("ram", tmp_path, options) as found:
        engine, link = found.engine, EmulatedLink(FAST)
        assert engine.queue.slots == 0
        engine.use_link(link)
        engine.use_link(link)
        assert engine.queue.slots == 6
        engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)))
        engine.use_link(EmulatedLink(FAST))
        assert engine.queue.slots == 6
