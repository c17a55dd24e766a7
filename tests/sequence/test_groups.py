"""Groups of tokens of a layer, wherever they lie: exact bytes, or an error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spdk_kv
from sequence.helpers import Reference, begun
from spdk_kv.errors import (
    ClosedError,
    CorruptionError,
    DeviceTimeout,
    ShapeMismatch,
)
from spdk_kv.sequence.runs import Runs
from store.helpers import bytes_of, folder_fixture, open_store
from support.waiting import in_use, wait_until

folder = folder_fixture
ENGINES = ("uring", "threads", "pagecache")


@pytest.fixture
def ram():
    with spdk_kv.open("ram://", capacity="32 MiB") as store:
        yield store


def check_groups(
    sequence: spdk_kv.Sequence, reference: Reference, layer: int, groups, group_tokens: int
) -> None:
    found = sequence.read_groups(layer, groups, group_tokens)
    same(found, reference, layer, groups, group_tokens)


def same(found, reference: Reference, layer: int, groups, group_tokens: int) -> None:
    shape = reference.shape
    for tensor, whole in zip(found, reference.layers[layer], strict=True):
        size = (len(groups), group_tokens, shape.kv_heads, shape.head_dim)
        assert (tuple(tensor.shape), tensor.dtype) == (size, whole.dtype)
        for at, (row, number) in enumerate(groups):
            tokens = slice(number * group_tokens, (number + 1) * group_tokens)
            assert bytes_of(tensor[at]) == bytes_of(whole[row, :, tokens].transpose(0, 1))


def some_groups(sequence: spdk_kv.Sequence, group_tokens: int, count: int, seed: int = 0):
    whole = sequence.tokens(0) // group_tokens
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, sequence.shape.batch, count)
    return np.stack([rows, rng.integers(0, whole, count)], 1)


# -- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_groups_of_any_size_from_the_drive_from_writes_and_from_the_tail(folder, engine, dtype):
    with open_store(folder, engine=engine) as store:
        sequence, reference = begun(store, "token", dtype=dtype)
        for count in (37, 1, 300, 5, 1):
            reference.append(sequence, count)
            for size in (1, 4, 5, 16):
                check_groups(sequence, reference, 1, some_groups(sequence, size, 23, count), size)
            sequence.settle(0)
            check_groups(sequence, reference, 0, some_groups(sequence, 4, 23), 4)


def test_all_groups_of_a_layer_in_order_are_the_layer(ram):
    sequence, reference = begun(ram, "token", [400], batch=1)
    check_groups(sequence, reference, 0, [(0, number) for number in range(100)], 4)
    k, _ = sequence.read_groups(0, np.empty((0, 2), int), 4)
    assert tuple(k.shape) == (0, 4, 3, 20)


def test_rows_that_changed_places(ram):
    sequence, reference = begun(ram, "token", [120], batch=3)
    reference.reorder(sequence, [2, 0, 0])
    reference.append(sequence, 9)
    reference.reorder(sequence, [1, 1, 2])
    reference.append(sequence, 111)
    for size in (1, 4, 7):
        check_groups(sequence, reference, 1, some_groups(sequence, size, 40), size)


def test_pieces_forks_and_what_is_restored(folder):
    with open_store(folder) as store:
        sequence, reference = begun(store, "token", [100, 700, 1500], max_tokens=None)
        other = sequence.fork("other", tokens=777)
        theirs = Reference(reference.shape, seed=99)
        theirs.layers = [(k[:, :, :777], v[:, :, :777]) for k, v in reference.layers]
        theirs.append(other, 600)
        reference.append(sequence, 300)
        check_groups(sequence, reference, 0, some_groups(sequence, 4, 60), 4)
        check_groups(other, theirs, 1, some_groups(other, 4, 60), 4)
        chunk_nbytes = sequence._layout.chunk_nbytes
    with open_store(folder) as store:
        assert store.sequence("s")._layout.chunk_nbytes == chunk_nbytes == 4096
        check_groups(store.sequence("s"), reference, 0, some_groups(store.sequence("s"), 4, 60), 4)
        check_groups(store.sequence("other"), theirs, 1, [(1, 0), (0, 343)], 4)


def test_a_reader_of_the_store_reads_groups(folder):
    with open_store(folder) as store:
        _, reference = begun(store, "token", [300])
        store.flush()
        with spdk_kv.open(f"file://{folder}", read_only=True) as reader:
            check_groups(reader.sequence("s"), reference, 0, [(1, 3), (0, 70)], 4)


def test_only_the_chunks_that_cover_them_are_read_and_shared_ones_once(folder):
    with open_store(folder) as store:
        # Rows of 1,536 bytes: four tokens are one chunk and a half.
        sequence, _ = begun(store, "token", [512], dtype="float32", kv_heads=3, head_dim=64)
        sequence.settle(0)
        for groups, chunks in (
            ([(0, 0)], 2),
            ([(0, 0), (0, 1)], 3),
            ([(0, 9), (0, 8), (0, 8)], 3),
            ([(0, 0), (1, 0)], 4),
            ([(0, 1), (0, 5)], 4),
        ):
            reading = sequence.start_groups(0, groups, 4)
            assert reading.nbytes == chunks * 4096
            reading.finish()


def test_appends_meanwhile_do_not_disturb_it(ram):
    sequence, reference = begun(ram, "token", [150])
    groups = some_groups(sequence, 4, 20)
    reading = sequence.start_groups(0, groups, 4)
    reference.append(sequence, 400)
    same(reading.finish(), reference, 0, groups, 4)


# -- what ends it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["truncate", "reorder"])
def test_a_change_of_what_was_asked_for_ends_it(ram, change):
    sequence, reference = begun(ram, "token", [300])
    reading = sequence.start_groups(0, [(0, 60)], 4)
    if change == "truncate":
        reference.truncate(sequence, 200)
        reference.append(sequence, 100)
    else:
        reference.reorder(sequence, [1, 0])
    with pytest.raises(ShapeMismatch, match="truncated or reordered"):
        reading.finish()
    check_groups(sequence, reference, 0, [(0, 60)], 4)


def test_a_deleted_sequence_and_a_closed_store_end_it(ram):
    sequence, _ = begun(ram, "token", [300])
    reading = sequence.start_groups(0, [(0, 60)], 4)
    sequence.delete()
    with pytest.raises(ClosedError):
        reading.finish()
    with pytest.raises(ClosedError):
        sequence.start_groups(0, [(0, 60)], 4)


def test_it_is_handed_over_once(ram):
    sequence, _ = begun(ram, "token", [300])
    reading = sequence.start_groups(0, [(0, 60)], 4)
    reading.finish()
    with pytest.raises(ValueError, match="once"):
        reading.finish()
    reading = sequence.start_groups(0, [(0, 60)], 4)
    reading.cancel()
    with pytest.raises(ValueError, match="once"):
        reading.finish()


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ([(2, 0)], 4),
        ([(-1, 0)], 4),
        ([(0, -1)], 4),
        ([(0, 25)], 4),
        ([(0, 0)], 0),
        ([(0.5, 1)], 4),
        ([0, 1, 2], 4),
    ],
)
def test_groups_that_are_not_there_are_refused(ram, groups, size):
    sequence, _ = begun(ram, "token", [103])
    with pytest.raises(ShapeMismatch):
        sequence.read_groups(0, groups, size)


def test_other_granularities_are_refused(ram):
    sequence, _ = begun(ram, "layer", [103])
    with pytest.raises(ShapeMismatch, match="granularity"):
        sequence.read_groups(0, [(0, 0)], 4)


# -- a drive that fails ---------------------------------------------------------------------------


class Damage:
    """Another bit in the first chunk of one extent, until it is mended."""

    def __init__(self, folder: Path, sequence: spdk_kv.Sequence, layer: int, number: int) -> None:
        self._data = folder / "data"
        self._at = next(sequence._layers[layer].contents.ranges(number, 0, 1))[0] + 1000
        self.mend()

    def mend(self) -> None:
        with open(self._data, "r+b") as data:
            data.seek(self._at)
            (byte,) = data.read(1)
            data.seek(self._at)
            data.write(bytes([byte ^ 4]))


@pytest.fixture(params=ENGINES)
def stored(folder, request):
    with open_store(folder, engine=request.param) as store:
        sequence, reference = begun(store, "token", [300])
        store.flush()
        yield store, sequence, reference


def test_a_damaged_group_is_an_error_and_the_others_are_whole(folder, stored):
    store, sequence, reference = stored
    Damage(folder, sequence, 0, 1)
    with pytest.raises(CorruptionError, match="CRC32C"):
        sequence.read_groups(0, [(0, 0), (1, 0)], 4)
    assert store.stats()["corruptions"] == 1
    check_groups(sequence, reference, 0, [(0, 0), (1, 30)], 4)
    check_groups(sequence, reference, 1, [(0, 0), (1, 0)], 4)


def test_what_was_wrong_once_is_read_again(folder, stored):
    store, sequence, reference = stored
    damage = Damage(folder, sequence, 0, 1)
    groups = [(0, 3), (1, 0), (1, 60), (1, 74)]
    reading = sequence.start_groups(0, groups, 4)
    wait_until(lambda: all(part.transfer.done for part in reading._parts))
    damage.mend()
    same(reading.finish(), reference, 0, groups, 4)
    assert store.stats()["corruptions"] == 0


def test_a_file_that_was_cut_off_is_an_error(folder, stored):
    _, sequence, _ = stored
    os.truncate(folder / "data", next(sequence._layers[0].contents.ranges(0, 0, 1))[0])
    with pytest.raises(CorruptionError, match="short read"):
        sequence.read_groups(0, [(0, 0), (1, 0)], 4)


def test_a_timeout_ends_the_wait_and_the_next_one_has_it(ram):
    sequence, reference = begun(ram, "token", [300])
    reading = sequence.start_groups(0, [(0, 60)], 4)
    with in_use(sequence._layers[0].lock):
        with pytest.raises(DeviceTimeout):
            sequence.start_groups(0, [(0, 60)], 4, timeout_s=0.02)
        same(reading.finish(timeout_s=30), reference, 0, [(0, 60)], 4)


# -- runs -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=20),
    st.integers(1, 20),
    st.sampled_from([1, 4, 16]),
)
def test_runs_are_the_least_that_covers_pieces(pieces, nbytes, chunk):
    numbers, starts = np.array(pieces, np.int64).reshape(-1, 2).T
    starts = starts * nbytes
    runs = Runs.covering(numbers, starts, nbytes, chunk)
    chunks = {
        (number, at)
        for number, start in zip(numbers, starts, strict=True)
        for at in range(start // chunk, -(-(start + nbytes) // chunk))
    }
    found = [
        (number, at)
        for number, start, end in zip(runs.numbers, runs.starts, runs.ends, strict=True)
        for at in range(start // chunk, end // chunk)
    ]
    assert sorted(chunks) == found
    assert runs.nbytes == len(chunks) * chunk
    touching = zip(runs.numbers, runs.ends, runs.numbers[1:], runs.starts[1:], strict=False)
    assert not any((number, end) == (other, start) for number, end, other, start in touching)
    memory = {
        int(at) + byte - int(start): (number, byte)
        for number, start, end, at in zip(*runs.within(0, 1 << 40), strict=True)
        for byte in range(int(start), int(end))
    }
    for place, number, start in zip(runs.places(numbers, starts), numbers, starts, strict=True):
        for byte in range(nbytes):
            assert memory[int(place) + byte] == (number, start + byte)
