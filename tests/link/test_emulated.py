"""Transfers over the emulated link: exact bytes, order, and what they tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from link.transfers import BLOCK, FAST, MIB, SEGMENT, noise, over, without_a_slot
from spdk_kv._native.checksum import crc32c
from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.transfer import DISCARD, FLUSH, PREFETCH, READ, WRITE
from spdk_kv.engines import QueueOptions
from spdk_kv.errors import DeviceError
from spdk_kv.testing import Medium, address_of
from support.media import EVERY, KEEPING, medium
from support.rounds import examples
from support.waiting import PATIENCE_S


@pytest.fixture(params=[k for k in KEEPING if not k.endswith("partition")])
def keeping(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def ram(tmp_path) -> Iterator[Medium]:
    with medium("ram", tmp_path) as found:
        yield found


@settings(max_examples=examples(40))
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
    engine.run(transfer, timeout_s=PATIENCE_S)
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
    engine.run(transfer, timeout_s=PATIENCE_S)
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


def test_a_demand_read_passes_a_prefetch_that_waits_for_slots(tmp_path) -> None:
    with medium("ram", tmp_path) as found:
        engine, link = found.engine, EmulatedLink(FAST)
        link.pause()
        ended: list[str] = []
        futures = [
            engine.start(
                over(engine, link, READ, 0, np.zeros(nbytes, np.uint8)),
                lambda transfer, name=name: ended.append(f"{name}: {transfer.status}"),
                priority=priority,
            )
            for name, nbytes, priority in (("prefetch", 8 * MIB, PREFETCH), ("demand", BLOCK, 0))
        ]
        # One that needs no slot does not wait for one.
        engine.run(without_a_slot(engine), timeout_s=PATIENCE_S)
        assert ended == []
        link.resume()
        for future in futures:
            future.result(PATIENCE_S)
        assert ended == ["demand: 0", "prefetch: 0"]


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
                engine.run(put, timeout_s=PATIENCE_S)
                into[:] = 0
                got = over(engine, link if turn % 3 else None, READ, at, into, checksum=True)
                engine.run(got, timeout_s=PATIENCE_S)
                outcomes.append(np.array_equal(into, data) and got.crc() == put.crc())
        except Exception as failure:
            outcomes.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
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
        assert [future.result(PATIENCE_S) for future in futures] == [0] * 6
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


def test_what_cannot_go_over_a_link_is_refused(ram) -> None:
    engine, link = ram.engine, EmulatedLink(FAST)
    for op in (FLUSH, DISCARD):
        with pytest.raises(ValueError, match="reads and writes"):
            engine.transfer(op, link=link)
    with pytest.raises(ValueError, match="hand_over needs"):
        engine.transfer(READ, link=link, hand_over=True, stream=0)
    with pytest.raises(ValueError, match="hand_over needs"):
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
    options = QueueOptions(depth=3, segment_nbytes=BLOCK, hugepages=False)
    with medium("ram", tmp_path, options) as found:
        engine, link = found.engine, EmulatedLink(FAST)
        assert engine.queue.slots == 0
        engine.use_link(link)
        engine.use_link(link)
        assert engine.queue.slots == 6
        engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)))
        engine.use_link(EmulatedLink(FAST))
        assert engine.queue.slots == 6
