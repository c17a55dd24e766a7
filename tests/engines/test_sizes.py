"""Sizes beyond what the native code counts in are refused where they come in."""

from __future__ import annotations

import os

import pytest

from spdk_kv._native.engines.memory import MemoryBackend
from spdk_kv._native.memory import Pool, Region
from spdk_kv._native.transfer import DISCARD, READ, WRITE, Queue, Transfer
from spdk_kv.engines import open_engine, parse_location

HUGE = [(1 << 50) + 1, 1 << 60, 1 << 62, (1 << 62) + 1, (1 << 64) - 1]


def null_queue(segment_nbytes: int = 1 << 20) -> Queue:
    backend = MemoryBackend(0)
    return Queue(
        backend.backend, backend, depth=4, segment_nbytes=segment_nbytes, block_nbytes=1,
        align_nbytes=1, slots=[], pid=os.getpid(),
    )  # fmt: skip


@pytest.mark.parametrize("nbytes", HUGE)
@pytest.mark.parametrize("kind", ["null", "ram"])
def test_a_discard_of_more_than_any_drive_has(kind, nbytes):
    engine = open_engine(parse_location(f"{kind}://"), capacity_nbytes=1 << 20)
    with pytest.raises(ValueError, match="no drive has"):
        engine.discard(0, nbytes)
    engine.close()


def test_a_discard_of_a_pebibyte_is_done():
    engine = open_engine(parse_location("null://"))
    engine.discard(0, 1 << 50)
    assert engine.stats()["ios"] == 1 << 20
    engine.close()


@pytest.mark.parametrize("op", [READ, WRITE, DISCARD])
@pytest.mark.parametrize("offset", [(1 << 62) + 1, (1 << 64) - 1])
def test_an_offset_that_no_drive_has(op, offset):
    transfer = Transfer(null_queue(), op)
    with pytest.raises(ValueError, match="no drive has"):
        transfer.add(offset, 0, 1)


@pytest.mark.parametrize(("address", "capacity"), [((1 << 64) - 4096, 0), (0, (1 << 64) - 1)])
def test_memory_that_no_machine_has(address, capacity):
    transfer = Transfer(null_queue(), READ)
    with pytest.raises(ValueError, match="no memory has"):
        transfer.add(0, address, 4096, capacity)


@pytest.mark.parametrize("chunk_nbytes", [0, 1])
@pytest.mark.parametrize("pieces", [1, 5])
def test_more_segments_than_are_counted(pieces, chunk_nbytes):
    """In all, and in one piece, whose number alone would already be cut to nothing."""
    queue = null_queue(1 if not chunk_nbytes else 1 << 20)
    transfer = Transfer(queue, READ, chunk_nbytes=chunk_nbytes)
    for piece in range(pieces):
        transfer.add(0, 0, (1 << 32) // pieces + piece)
    with pytest.raises(ValueError, match="too many for one transfer"):
        transfer.run()
    assert queue.active == 0


@pytest.mark.parametrize("segment_nbytes", [(1 << 30) + 1, 1 << 31, (1 << 32) - 1])
def test_a_segment_whose_result_would_be_negative(segment_nbytes):
    with pytest.raises(ValueError, match="at most 1 GiB"):
        null_queue(segment_nbytes)


@pytest.mark.parametrize("nbytes", [1 << 56, (1 << 60) + 1, 1 << 63, (1 << 64) - 1])
def test_memory_of_any_size_is_refused_with_memory_error(nbytes):
    for hugepages in (False, True):
        with pytest.raises(MemoryError):
            Region(nbytes, hugepages)
    with pytest.raises(MemoryError):
        Pool(lambda wanted: Region(wanted), 1 << 20).lease(nbytes)
