"""How transfers over a link are cut: the plan, a pure function; and the pipeline that measures."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import QueueOptions
from spdk_kv.link.cuda import link_for
from spdk_kv.link.pipeline import Pipeline
from spdk_kv.link.planner import Cut, Limits, Planner, first_cut
from spdk_kv.testing import address_of
from spdk_kv.units import GIB, KIB, MIB
from support.media import medium
from support.waiting import PATIENCE_S

LIMITS = Limits(max_segment_nbytes=MIB, multiple_nbytes=4 * KIB, slots=32)
TENSOR = 64 * MIB


class Drive:
    """Transfers of one size take what ``s_per_byte(cut)`` says, more or less ``noise`` of it, and
    now and then five times as long."""

    def __init__(self, planner: Planner, noise: float = 0.0, nbytes: int = TENSOR) -> None:
        self.planner, self.noise, self.nbytes = planner, noise, nbytes
        self.random = np.random.default_rng(5)
        self.used: Counter[Cut] = Counter()
        self.took_s = 0.0

    def run(self, transfers: int, s_per_byte) -> Cut:
        """The cut that most of the last ones had."""
        last: Counter[Cut] = Counter()
        for turn in range(transfers):
            cut = self.planner.next()
            took_s = self.nbytes * s_per_byte(cut)
            took_s *= 1 + self.noise * self.random.normal() / 2
            if self.noise and self.random.random() < 0.03:
                took_s *= 5
            self.planner.note(cut, self.nbytes, max(took_s, 1e-9))
            self.took_s += took_s
            self.used[cut] += 1
            last[cut] += 2 * turn >= transfers - 1
        return last.most_common(1)[0][0]


def prefers(chunk: int, depth: int, gib_s: float = 4.0, loss: float = 0.15):
    """A drive that does ``gib_s`` with that cut, and loses a part with every doubling away."""

    def s_per_byte(cut: Cut) -> float:
        away = abs(math.log2(cut.segment_nbytes / chunk)) + abs(math.log2(cut.depth / depth))
        return (1 + loss * away) / (gib_s * GIB)

    return s_per_byte


def test_at_first_chunks_overlap_and_are_not_small_for_a_drive() -> None:
    assert first_cut(TENSOR, LIMITS) == Cut(MIB, 32)
    assert first_cut(4 * MIB, LIMITS) == Cut(512 * KIB, 32)
    assert first_cut(300 * KIB, LIMITS) == Cut(256 * KIB, 32)
    assert first_cut(1, Limits(MIB, 512 * KIB, 3)) == Cut(512 * KIB, 3)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [64 * KIB, 256 * KIB, MIB])
@pytest.mark.parametrize("depth", [4, 32])
def test_it_finds_what_is_best(chunk, depth, noise) -> None:
    drive = Drive(Planner(TENSOR, LIMITS), noise)
    assert drive.run(800, prefers(chunk, depth)) == Cut(chunk, depth)


def test_a_size_in_between_that_is_no_better_hides_nothing() -> None:
    drive = Drive(Planner(TENSOR, LIMITS), 0.1)
    speeds = {64 * KIB: 3, 128 * KIB: 5, 256 * KIB: 5.6, 512 * KIB: 4.3, MIB: 4.4}
    best = drive.run(400, lambda cut: 1 / (speeds[cut.segment_nbytes] * GIB))
    assert best.segment_nbytes == 256 * KIB


def test_behind_other_transfers_the_whole_depth_is_used() -> None:
    drive = Drive(Planner(TENSOR, replace(LIMITS, whole_depth=True)))
    assert drive.run(400, prefers(256 * KIB, 4)) == Cut(256 * KIB, 32)
    assert {cut.depth for cut in drive.used} == {32}


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_trying_costs_next_to_nothing_where_nothing_is_better(noise) -> None:
    drive = Drive(Planner(TENSOR, LIMITS), noise)
    best = Cut(MIB, 32)
    transfers = 3000
    assert drive.run(transfers, prefers(*astuple(best))) == best
    perfect = Drive(Planner(TENSOR, LIMITS), noise)
    for _ in range(transfers):
        perfect.took_s += TENSOR / (4 * GIB)
    if not noise:
        assert drive.took_s <= 1.005 * perfect.took_s
    assert drive.used.total() - drive.used[best] <= 0.04 * transfers


def test_noise_does_not_make_it_jump() -> None:
    """All ways are alike, and times spread by a fifth: it stays where it is, or nearly so."""
    planner = Planner(TENSOR, LIMITS)
    drive, moves, last = Drive(planner, 0.2), 0, planner.best
    for _ in range(2000):
        drive.run(1, lambda cut: 1 / (4 * GIB))
        moves += planner.best != last
        last = planner.best
    assert moves <= 4


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_drive_that_slows_tenfold_is_followed_and_so_is_its_recovery(noise) -> None:
    drive = Drive(Planner(TENSOR, LIMITS), noise)
    fast, slow = prefers(MIB, 32), prefers(128 * KIB, 8, 0.4)
    assert drive.run(300, fast) == Cut(MIB, 32)
    assert drive.run(300, slow) == Cut(128 * KIB, 8)
    assert drive.planner.bytes_per_s == pytest.approx(0.4 * GIB, rel=0.1)
    assert drive.run(300, fast) == Cut(MIB, 32)


def test_a_drive_that_slows_tenfold_at_once_makes_no_plan_worse() -> None:
    """What was seen of other cuts while it was fast does not count against the one in use."""
    drive = Drive(Planner(TENSOR, LIMITS))
    drive.run(300, prefers(MIB, 32))
    for _ in range(100):
        drive.run(1, prefers(MIB, 32, 0.4))
        assert drive.planner.best == Cut(MIB, 32)


def test_outcomes_that_never_come_do_not_stop_it() -> None:
    planner = Planner(TENSOR, LIMITS)
    best, lost = planner.best, 0
    for _ in range(1500):
        cut = planner.next()
        if cut == best:
            planner.note(cut, TENSOR, 0.02)
        else:
            lost += 1
    assert 0 < lost < 150
    assert Drive(planner).run(2000, prefers(256 * KIB, 32)) == Cut(256 * KIB, 32)


@given(
    nbytes=st.integers(1, 1 << 36),
    segment=st.sampled_from([4096, 12288, 48 * KIB, MIB, 3 * MIB, 1 << 30]),
    multiple=st.sampled_from([1, 512, 4096]),
    slots=st.integers(1, 100),
    took=st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), max_size=300),
)
def test_every_plan_keeps_to_the_limits_and_depends_on_nothing_else(
    nbytes, segment, multiple, slots, took
) -> None:
    limits = Limits(segment, multiple, slots)
    planner, same = Planner(nbytes, limits), Planner(nbytes, limits)
    for took_s, comes in took:
        cut = planner.next()
        assert cut == same.next()
        assert 0 < cut.segment_nbytes <= segment
        assert cut.segment_nbytes % multiple == 0
        assert 1 <= cut.depth <= slots
        if comes:
            planner.note(cut, nbytes, took_s)
            same.note(cut, nbytes, took_s)
    assert planner.why() == same.why()


def test_limits_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        Planner(MIB, Limits(48 * KIB, 32 * KIB, 8))


@pytest.mark.parametrize("kind", ["ram", "uring-file", "pagecache-file"])
def test_a_pipeline_moves_exact_bytes_while_it_learns(kind, tmp_path) -> None:
    options = QueueOptions(depth=8, segment_nbytes=MIB, hugepages=False)
    with medium(kind, tmp_path, options) as found:
        engine, link = found.engine, EmulatedLink(20e9, 2e-6)
        pipeline = Pipeline(engine, link)
        tried = set()
        for turn in range(120):
            data = np.full(4 * MIB + 5, turn, np.uint8)
            for op in (WRITE, READ):
                side = data if op == WRITE else np.zeros_like(data)
                transfer = pipeline.transfer(op, len(side), chunk_nbytes=64 * KIB, checksum=True)
                transfer.keep(side)
                transfer.add(0, address_of(side), len(side))
                engine.run(transfer, timeout_s=PATIENCE_S)
                assert np.array_equal(side, data)
                chosen = pipeline.stats()["write" if op == WRITE else "read"]
                tried.add((op, chosen["segment_nbytes"]))
        assert len(tried) > 2, "it never tried another segment size"
        for op in ("read", "write"):
            assert "nothing" not in pipeline.stats()[op]["reason"]
        stats = pipeline.stats()
        assert stats["mode"] == "adaptive"
        assert 0 <= stats["overlap"] <= 1
        assert stats["queued"] == 0
        assert stats["read"]["reached_gib_s"] > 0
        assert stats["drive_gib_s"] > 0
        assert stats["link_gib_s"] > 0
        assert "GiB/s" in stats["read"]["reason"]


def test_a_fixed_pipeline_does_as_told(tmp_path) -> None:
    options = QueueOptions(depth=8, segment_nbytes=MIB, hugepages=False)
    with medium("ram", tmp_path, options) as found:
        link = EmulatedLink(20e9)
        pipeline = Pipeline(found.engine, link, "fixed", segment_nbytes=128 * KIB, depth=3)
        into = np.zeros(2 * MIB, np.uint8)
        transfer = pipeline.transfer(READ, len(into))
        transfer.keep(into)
        transfer.add(0, address_of(into), len(into))
        found.engine.run(transfer)
        assert link.stats()["copies"] == 16
        assert pipeline.stats()["read"] == {
            "segment_nbytes": 128 * KIB, "depth": 3, "reason": "as given"
        }  # fmt: skip
        for wrong in ({"mode": "serial"}, {"segment_nbytes": MIB}):
            with pytest.raises(ValueError, match="mode"):
                Pipeline(found.engine, link, **wrong)


def test_transfers_queued_behind_others_are_planned_apart(tmp_path) -> None:
    options = QueueOptions(depth=8, segment_nbytes=MIB, hugepages=False)
    with medium("ram", tmp_path, options) as found:
        engine, link = found.engine, EmulatedLink(5e9)
        pipeline, other = Pipeline(engine, link), Pipeline(engine, link)
        other.plan(READ, 4 * MIB)
        views = [np.zeros(4 * MIB, np.uint8) for _ in range(2)]
        depths: tuple[set[int], set[int]] = (set(), set())
        for _ in range(60):
            made = []
            link.pause()  # so that the first is not over when the second is planned
            for view, planned in zip(views, depths, strict=True):
                transfer = pipeline.transfer(READ, len(view))
                planned.add(pipeline.stats()["read"]["depth"])
                transfer.keep(view)
                transfer.add(0, address_of(view), len(view))
                transfer.submit()
                made.append(transfer)
            link.resume()
            for transfer in made:
                engine.wait(transfer)
        assert 0.4 <= pipeline.stats()["queued"] <= 0.6
        assert pipeline.stats()["read"]["reached_gib_s"] > 0
        assert len(depths[0]) > 1, "one that is alone tries other depths"
        assert depths[1] == {engine.queue.slots}
        # Another pipeline on the same engine learns nothing from those.
        assert "nothing is measured" in other.stats()["read"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see test_gpu.py")
def test_without_a_gpu_there_is_a_reason() -> None:
    assert link_for("cpu") == (None, "cpu is no CUDA device")
    link, reason = link_for("cuda")
    assert link is None
    assert "without CUDA" in reason or "no usable GPU" in reason
