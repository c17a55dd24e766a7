"""Histograms of times."""

from __future__ import annotations

import os
import random

import pytest

from spdk_kv._native.engines.memory import MemoryBackend
from spdk_kv._native.transfer import READ, Queue, Transfer
from spdk_kv.metrics import share_below
from spdk_kv.metrics.times import BOUNDS_NS, cumulated
from spdk_kv.testing import address_of, memory


def test_counts_up_to_a_bound_are_exact() -> None:
    times = {1 << 13: 1, (1 << 13) + (1 << 11): 2, 1 << 14: 4, 1 << 33: 8, 1 << 34: 16}
    found = dict(cumulated(times))
    assert found[1 << 13] == 1
    assert found[1 << 14] == 7
    assert found[1 << 32] == 7
    assert found[1 << 33] == 15
    assert found[None] == 31
    assert list(found) == [*BOUNDS_NS, None]


def test_bounds_are_ends_of_native_buckets() -> None:
    """Otherwise a bucket would lie on both sides of a bound, and its count be wrong on one."""
    backend = MemoryBackend(4096)
    queue = Queue(
        backend.backend, backend, depth=1, segment_nbytes=4096, block_nbytes=1, align_nbytes=1,
        slots=[], pid=os.getpid(),
    )  # fmt: skip
    buffer = memory(4096)
    for _ in range(200):
        transfer = Transfer(queue, READ)
        transfer.add(0, address_of(buffer), 4096)
        assert transfer.run() == 0
    ends = queue.stats()["ops"]["read"]["took"]
    queue.close()
    for end_ns in ends:
        width = 1 << max(0, (end_ns - 1).bit_length() - 3)
        assert end_ns % width == 0
        assert not any(end_ns - width < bound < end_ns for bound in BOUNDS_NS)


def test_shares_are_near_the_truth() -> None:
    chance = random.Random(7)
    taken = sorted(int(chance.lognormvariate(12, 1.2)) for _ in range(5000))
    times: dict[int, int] = {}
    for ns in taken:
        width = 1 << max(0, ns.bit_length() - 3)
        end_ns = (ns // width + 1) * width
        times[end_ns] = times.get(end_ns, 0) + 1
    for share in (0.1, 0.5, 0.9, 0.99):
        truth = taken[int(share * len(taken))] / 1e9
        assert share_below(times, share) == pytest.approx(truth, rel=0.1)


def test_no_times_have_no_median() -> None:
    assert share_below({}, 0.5) is None
    assert share_below({1024: 0}, 0.5) is None
