"""A long append goes to the drive in slices: the same bytes, few of them waiting, and a write that
fails amid them fails the layer for good."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from sequence.helpers import Reference, shape_of
from spdk_kv.errors import DeviceError
from spdk_kv.sequence import writer as sequence_writer
from store.helpers import open_store

SLICE = 64 << 10
TOKENS = 2900  # rows of 240 bytes in 2 extents: about 22 slices
SHAPE = shape_of(max_tokens=6000)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr(sequence_writer, "_SLICE_NBYTES", SLICE)
    monkeypatch.setattr(sequence_writer, "_MOST_PENDING_NBYTES", 3 * SLICE)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "kv", capacity="64 MiB", engine="pagecache") as opened:
        yield opened


def before_slice(monkeypatch, number: int, act: Callable[[], None]) -> list[int]:
    """Calls ``act`` before slice ``number`` is laid out; returns the tokens of every slice."""
    lay_out, counts = sequence_writer.whole_chunks, []

    def whole_chunks(layout, staging, engine, start, tails, k, v, gpu):
        counts.append(k.shape[2])
        if len(counts) == number:
            act()
        return lay_out(layout, staging, engine, start, tails, k, v, gpu)

    monkeypatch.setattr(sequence_writer, "whole_chunks", whole_chunks)
    return counts


def out_of_memory() -> None:
    raise MemoryError("no room for a slice")


def uses(sequence, store, k, v):
    """Everything that would give away, or add to, what is not all there."""
    return (
        lambda: sequence.read(0),
        lambda: sequence.read(0, tokens=slice(0, 5)),
        lambda: sequence.append(0, k, v),
        lambda: sequence.truncate(0),
        lambda: sequence.settle(0),
        store.flush,
    )


def test_slices_are_what_was_appended_and_few_wait(store, monkeypatch):
    sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 7)
    limit, pending = sequence_writer.Writer.limit_pending, []

    def limited(writer, deadline) -> None:
        limit(writer, deadline)
        pending.append(writer.pending_nbytes)

    monkeypatch.setattr(sequence_writer.Writer, "limit_pending", limited)
    counts = before_slice(monkeypatch, 0, out_of_memory)
    reference.append(sequence, TOKENS)
    assert sum(counts) == TOKENS * SHAPE.layers
    assert max(counts) * 240 * 2 <= SLICE
    assert len(pending) > 20
    assert 0 < max(pending) <= 3 * SLICE
    reference.check(sequence)
    reference.append(sequence, 9)
    reference.check(sequence, tokens=slice(100, None))


def test_no_memory_for_the_first_slice_changes_nothing(store, monkeypatch):
    sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 300)
    before_slice(monkeypatch, 1, out_of_memory)
    with pytest.raises(MemoryError):
        sequence.append(0, *Reference(SHAPE, seed=9).tokens(TOKENS))
    reference.check(sequence)
    reference.append(sequence, TOKENS)
    reference.check(sequence)


@pytest.mark.parametrize("number", [2, 9])
def test_no_memory_for_a_later_slice_changes_nothing(store, monkeypatch, number):
    sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 300)
    before_slice(monkeypatch, number, out_of_memory)
    k, v = Reference(SHAPE, seed=9).tokens(TOKENS)
    with pytest.raises(MemoryError):
        sequence.append(0, k, v)
    reference.check(sequence)
    # What is appended now lies where the slices lie that were written already.
    reference.append(sequence, 500)
    reference.check(sequence)
    store.flush()
    reference.check(sequence)


def test_a_write_that_fails_amid_slices_fails_the_layer(store, monkeypatch, tmp_path):
    sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 300)
    sequence.settle(0)
    sequence.settle(1)
    fd = store.engine.fd
    writable, readable = os.dup(fd), os.open(tmp_path / "kv" / "data", os.O_RDONLY)
    # From the third slice on the drive takes nothing, as one that turned read-only.
    counts = before_slice(monkeypatch, 3, lambda: os.dup2(readable, fd) and None)
    k, v = Reference(SHAPE, seed=9).tokens(TOKENS)
    try:
        with pytest.raises(DeviceError, match="EBADF"):
            sequence.append(0, k, v)
    finally:
        os.dup2(writable, fd)
        os.close(writable)
        os.close(readable)
    assert 3 <= len(counts) < TOKENS // max(counts), "it went on though a write had failed"
    for use in uses(sequence, store, k, v):
        with pytest.raises(DeviceError, match="EBADF"):
            use()
    reference.check_layer(sequence, 1)
    sequence.delete()
