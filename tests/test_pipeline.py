"""How transfers over a link are cut: the plan, a pure function; and the pipeline that measures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import address_of, medium

from spdk_kv._native.emulated_link import EmulatedLink
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import EngineOptions
from spdk_kv.link import Limits, Pipeline, Rate, choose, link_for
from spdk_kv.units import GIB, KIB, MIB

LIMITS = Limits(segment_nbytes=MIB, multiple_nbytes=4 * KIB, slots=32)
CHUNKS = [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB]


def seen(chunk: int, gib_s: float, depth: int = 8, at_once: float = 1) -> Rate:
    nbytes = gib_s * GIB / 2
    return Rate(chunk, depth, nbytes, 0.5e9, nbytes / chunk / at_once)


def test_before_anything_is_measured_chunks_overlap() -> None:
    assert choose(64 * MIB, [], 0, 0, LIMITS).chunk_nbytes == MIB
    assert choose(2 * MIB, [], 0, 0, LIMITS).chunk_nbytes == 256 * KIB
    assert choose(64 * MIB, [], 0, 0, LIMITS).depth == 32
    # A handful of commands says nothing yet.
    few = [Rate(MIB, 8, 3 * MIB, 1e6, 3)]
    assert choose(64 * MIB, few, 0, 0, LIMITS) == choose(64 * MIB, [], 0, 0, LIMITS)


def test_the_fastest_chunk_for_the_drive_wins_for_large_transfers() -> None:
    for fastest in CHUNKS:
        rates = [seen(chunk, 5 if chunk == fastest else 3) for chunk in CHUNKS]
        plan = choose(256 * MIB, rates, 2e-6, 1 / (20 * GIB), LIMITS)
        assert plan.chunk_nbytes == fastest
        assert "5.00 GiB/s" in plan.reason


def test_small_transfers_take_smaller_chunks_where_the_drive_is_as_fast() -> None:
    rates = [seen(chunk, 4) for chunk in CHUNKS]
    large = choose(256 * MIB, rates, 1e-6, 1 / (8 * GIB), LIMITS)
    small = choose(2 * MIB, rates, 1e-6, 1 / (8 * GIB), LIMITS)
    assert large.chunk_nbytes == MIB
    assert small.chunk_nbytes < MIB


def test_a_link_that_takes_long_for_every_copy_wants_large_chunks() -> None:
    rates = [seen(chunk, 4) for chunk in CHUNKS]
    plan = choose(4 * MIB, rates, 200e-6, 1 / (20 * GIB), LIMITS)
    assert plan.chunk_nbytes == MIB


def test_a_drive_that_answers_in_bursts_wants_small_chunks() -> None:
    # What it ends with goes over the link after it, all of it.
    steady = [seen(chunk, 3) for chunk in CHUNKS]
    bursts = [seen(chunk, 3, at_once=16) for chunk in CHUNKS]
    assert choose(64 * MIB, steady, 2e-6, 1 / (7 * GIB), LIMITS).chunk_nbytes == MIB
    assert choose(64 * MIB, bursts, 2e-6, 1 / (7 * GIB), LIMITS).chunk_nbytes <= 256 * KIB


def test_what_was_not_tried_is_hoped_for_and_then_known() -> None:
    rates = [seen(MIB, 3)]
    plan = choose(64 * MIB, rates, 1e-6, 1 / (20 * GIB), LIMITS)
    assert plan.chunk_nbytes == 512 * KIB
    assert "to be tried" in plan.reason
    worse = [*rates, *(seen(chunk, 2.5) for chunk in CHUNKS[:-1])]
    assert choose(64 * MIB, worse, 1e-6, 1 / (20 * GIB), LIMITS).chunk_nbytes == MIB


def test_the_depth_is_the_least_that_gives_the_speed() -> None:
    rates = [seen(chunk, speed, depth) for chunk in CHUNKS
             for depth, speed in ((2, 3), (4, 3.95), (16, 4))]  # fmt: skip
    plan = choose(256 * MIB, rates, 0, 1 / (20 * GIB), LIMITS)
    assert plan.depth == 2 * 4 + 4  # up to twice of what was seen as 4, and 4 beside the drive
    assert choose(256 * MIB, rates, 0, 1 / (20 * GIB), Limits(MIB, 4096, 6)).depth == 6


@given(
    nbytes=st.integers(1, 1 << 36),
    rates=st.lists(
        st.builds(
            Rate,
            st.sampled_from([1 << power for power in range(9, 28)]),
            st.sampled_from([1 << power for power in range(12)]),
            *[st.floats(0, 1e15)] * 3,
        ),
        max_size=20,
    ),
    latency_s=st.floats(0, 1),
    s_per_byte=st.floats(0, 1e-3),
    segment=st.sampled_from([4096, 12288, 48 * KIB, MIB, 3 * MIB, 1 << 30]),
    multiple=st.sampled_from([1, 512, 4096]),
    slots=st.integers(1, 100),
)
def test_every_plan_keeps_to_the_limits(
    nbytes, rates, latency_s, s_per_byte, segment, multiple, slots
) -> None:
    limits = Limits(segment, multiple, slots)
    plan = choose(nbytes, rates, latency_s, s_per_byte, limits)
    assert plan == choose(nbytes, rates, latency_s, s_per_byte, limits)
    assert 0 < plan.chunk_nbytes <= segment
    assert plan.chunk_nbytes % multiple == 0
    assert 1 <= plan.depth <= slots


def test_what_came_while_the_queue_drained_says_nothing_about_its_depth() -> None:
    rates = [seen(chunk, 4, 16) for chunk in CHUNKS]
    drained = [replace(seen(chunk, 5, 1), nbytes=0.1 * GIB, busy_ns=0.02e9) for chunk in CHUNKS]
    plan = choose(256 * MIB, rates + drained, 0, 1 / (20 * GIB), LIMITS)
    assert plan.depth == 32
    assert "4.00 GiB/s" in plan.reason


def test_limits_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        choose(MIB, [], 0, 0, Limits(48 * KIB, 32 * KIB, 8))


@pytest.mark.parametrize("kind", ["ram", "uring-file", "pagecache-file"])
def test_a_pipeline_moves_exact_bytes_while_it_learns(kind, tmp_path) -> None:
    options = EngineOptions(depth=8, segment_nbytes=MIB, hugepages=False)
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
                engine.run(transfer, timeout_s=60)
                assert np.array_equal(side, data)
                chosen = pipeline.stats()["write" if op == WRITE else "read"]
                tried.add((op, chosen["chunk_nbytes"]))
        assert len(tried) > 2, "it never tried another chunk"
        for op in ("read", "write"):
            assert "nothing" not in pipeline.stats()[op]["reason"]
        stats = pipeline.stats()
        assert stats["mode"] == "adaptive"
        assert 0 <= stats["overlap"] <= 1.01
        assert stats["drive_gib_s"] > 0
        assert stats["link_gib_s"] > 0
        assert "GiB/s" in stats["read"]["reason"]


def test_a_fixed_pipeline_does_as_told(tmp_path) -> None:
    options = EngineOptions(depth=8, segment_nbytes=MIB, hugepages=False)
    with medium("ram", tmp_path, options) as found:
        link = EmulatedLink(20e9)
        pipeline = Pipeline(found.engine, link, "fixed", chunk_nbytes=128 * KIB, depth=3)
        into = np.zeros(2 * MIB, np.uint8)
        transfer = pipeline.transfer(READ, len(into))
        transfer.keep(into)
        transfer.add(0, address_of(into), len(into))
        found.engine.run(transfer)
        assert link.stats()["copies"] == 16
        assert pipeline.stats()["read"] == {
            "chunk_nbytes": 128 * KIB, "depth": 3, "reason": "as given"
        }  # fmt: skip
        for wrong in ({"mode": "serial"}, {"chunk_nbytes": MIB}):
            with pytest.raises(ValueError, match="mode"):
                Pipeline(found.engine, link, **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see test_link_gpu.py")
def test_without_a_gpu_there_is_a_reason() -> None:
    assert link_for("cpu") == (None, "cpu is no CUDA device")
    link, reason = link_for("cuda")
    assert link is None
    assert "without CUDA" in reason or "no usable GPU" in reason
