"""What a queue counts by operation: commands, bytes, transfers, errors, times."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.errors import SpdkKvError
from spdk_kv.testing import SMALL, Medium, address_of, memory
from support.media import EVERY, medium

BLOCK = 4096
SEGMENT = SMALL.segment_nbytes
OPS = ("read", "write", "flush", "discard")


@pytest.fixture(params=EVERY)
def each(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


def move(engine, op: int, pieces: int, nbytes: int = SEGMENT) -> None:
    buffer = memory(nbytes)
    transfer = engine.transfer(op)
    for _ in range(pieces):
        transfer.add(0, address_of(buffer), nbytes)
    engine.run(transfer)


def test_each_operation_is_counted_by_itself(each: Medium) -> None:
    engine = each.engine
    before = engine.stats()["ops"]
    assert {name: before[name]["transfers"] for name in OPS} == dict.fromkeys(OPS, 0)
    began = time.monotonic_ns()
    for _ in range(3):
        move(engine, WRITE, 2)
    for _ in range(5):
        move(engine, READ, 4)
    engine.flush()
    passed = time.monotonic_ns() - began
    stats = engine.stats()
    ops = stats["ops"]
    assert [ops[name]["transfers"] for name in OPS] == [5, 3, 1, 0]
    assert [ops[name]["ios"] for name in OPS] == [20, 6, 1, 0]
    assert [ops[name]["nbytes"] for name in OPS] == [20 * SEGMENT, 6 * SEGMENT, 0, 0]
    assert [ops[name]["errors"] for name in OPS] == [0, 0, 0, 0]
    for name in OPS:
        assert sum(ops[name]["latency"].values()) == ops[name]["ios"]
        assert sum(ops[name]["took"].values()) == ops[name]["transfers"]
        assert ops[name]["took_ns"] <= passed
    # The sums are as they always were.
    assert stats["ios"] == 27
    assert stats["transfers"] == 9
    assert stats["read_nbytes"] == 20 * SEGMENT
    assert stats["written_nbytes"] == engine.written_nbytes == 6 * SEGMENT
    assert stats["latency_ns"] == sum(ops[name]["latency_ns"] for name in OPS)
    assert stats["busy_ns"] <= passed
    assert stats["cpu_ns"] > 0


def test_buckets_hold_the_times_that_they_name(each: Medium) -> None:
    move(each.engine, WRITE, 1)
    write = each.engine.stats()["ops"]["write"]
    for total, times in ((write["latency_ns"], "latency"), (write["took_ns"], "took")):
        ((end_ns, count),) = write[times].items()
        assert count == 1
        # A bucket is a quarter of the doubling that it is in.
        assert total < end_ns <= max(16, total + total / 4 + 1)


def test_failures_are_counted_with_their_operation(tmp_path) -> None:
    with medium("threads-file", tmp_path) as found:
        buffer = memory(SEGMENT)
        beyond = found.engine.transfer(READ)
        beyond.add(1 << 30, address_of(buffer), SEGMENT)
        with pytest.raises(SpdkKvError, match="short read"):
            found.engine.run(beyond)
        move(found.engine, READ, 1)
        move(found.engine, WRITE, 1)
        ops = found.engine.stats()["ops"]
        assert [ops[name]["errors"] for name in OPS] == [1, 0, 0, 0]
        assert [ops[name]["transfers"] for name in OPS] == [2, 1, 0, 0]


def test_the_cpu_time_of_a_pool_is_its_threads(tmp_path) -> None:
    """Reading through the page cache is copying, and that is what costs CPU time."""
    with medium("pagecache-file", tmp_path) as found:
        move(found.engine, WRITE, 1)
        before = found.engine.stats()["cpu_ns"]
        began = time.process_time_ns()
        for _ in range(50):
            move(found.engine, READ, 64)
        spent = found.engine.stats()["cpu_ns"] - before
        assert 0 < spent <= time.process_time_ns() - began
