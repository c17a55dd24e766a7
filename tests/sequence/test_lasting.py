"""What of a sequence outlives its process: flushes, kills, truncation, order, temporary ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from sequence.helpers import Reference, begun, shape_of
from spdk_kv.errors import CorruptionError, DeviceError, KeyNotFound, ShapeMismatch, SpdkKvError
from store.helpers import check_books, folder_fixture, kill_loop, noise, open_store, python, reopen
from support.places import TESTS
from support.rounds import rounds
from support.waiting import wait_until

folder = folder_fixture
GRANULARITIES = ("layer", "head", "token")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("steps", [[], [1], [67], [68], [69], [300, 1, 1], [600]], ids=str)
def test_a_closed_store_has_its_sequences_when_reopened(folder, granularity, steps):
    with open_store(folder, capacity="64 MiB") as store:
        _, reference = begun(store, granularity, steps)
        store.put("blob", noise(100))
    for _ in range(2):
        with reopen(folder) as store:
            assert store.sequences() == ["s"]
            sequence = store.sequence("s")
            assert (sequence.shape, sequence.granularity) == (reference.shape, granularity)
            reference.check(sequence)
            if sum(steps) < 590:
                reference.append(sequence, 3)
                reference.check(sequence)
            check_books(store)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layers_of_unequal_length_last(folder, granularity):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, granularity, [10])
        reference.append(sequence, 150, layer=1)
        reference.reorder(sequence, [1, 1])
    with reopen(folder) as store:
        sequence = store.sequence("s")
        assert (sequence.tokens(0), sequence.tokens(1)) == (10, 160)
        reference.check(sequence)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_order_of_rows_lasts(folder, granularity):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, granularity, [90], batch=4)
        for rows in ([3, 1, 0, 0], [1, 0, 3, 2], [0, 1, 2, 3]):
            reference.reorder(sequence, rows)
            reference.append(sequence, 33)
            reference.check(sequence)
        reference.truncate(sequence, 100)
        reference.reorder(sequence, [2, 2, 1, 0])
        reference.append(sequence, 50)
    for _ in range(2):
        with reopen(folder) as store:
            sequence = store.sequence("s")
            reference.check(sequence)
            reference.reorder(sequence, [3, 0, 1, 2])
            reference.check(sequence)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_truncation_lasts(folder, granularity):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, granularity, [500])
        for tokens in (500, 499, 205, 204, 68, 60):
            store.flush()
            reference.truncate(sequence, tokens)
            reference.check(sequence)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
        reference.truncate(store.sequence("s"), 0)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
        reference.append(store.sequence("s"), 70)
        reference.check(store.sequence("s"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_takes_the_place_of_truncated_tokens_of_a_tail_lasts(folder, granularity):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, granularity, [30])
        store.flush()
        reference.truncate(sequence, 20)
        reference.append(sequence, 10)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))


@pytest.mark.parametrize("reopened", [False, True])
def test_a_truncation_of_what_is_recorded_is_committed_at_once(folder, reopened):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [400])
    with reopen(folder) as store:
        sequence = store.sequence("s")
        if not reopened:  # what is recorded is known from its recording, not from its restoring
            reference.append(sequence, 1)
            store.flush()
        index = store.catalog.committer.index
        before = index.commits
        reference.truncate(sequence, 300)
        assert index.commits == before + 1
        assert not sequence.dirty
        reference.append(sequence, 50)
        reference.truncate(sequence, 320)
        assert index.commits == before + 1, "no record covers those tokens"
        assert sequence.dirty
        reference.check(sequence)


def test_a_temporary_sequence_is_gone_after_close_and_its_space_with_it(folder):
    with open_store(folder, capacity="64 MiB") as store:
        free = store.stats()["free_nbytes"]
        shape = shape_of()
        sequence = store.sequence("t", shape, temporary=True)
        reference = Reference(shape)
        reference.append(sequence, 300)
        store.flush()
        reference.truncate(sequence, 100)
        reference.append(sequence, 50)
        reference.check(sequence)
    with reopen(folder) as store:
        assert store.sequences() == []
        assert store.stats()["free_nbytes"] == free
        with pytest.raises(KeyNotFound):
            store.sequence("t")


def test_a_deleted_sequence_stays_deleted(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, _ = begun(store, "layer", [300])
        store.flush()
        sequence.delete()
        _, reference = begun(store, "head", [20])  # another of the same name
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
        store.sequence("s").delete()
    with reopen(folder) as store:
        assert store.sequences() == []
        assert store.stats()["used_nbytes"] == 0


# -- kills ----------------------------------------------------------------------------------------

_KILLED = """
import os, sys
sys.path[:0] = [sys.argv[2]]
import torch
from sequence.helpers import Reference, shape_of
from store.helpers import open_store

store = open_store(sys.argv[1], capacity="64 MiB")
shape = shape_of()
sequence = store.sequence("s", shape, granularity=sys.argv[3])
reference = Reference(shape)
exec(sys.argv[4])
for layer in range(2):
    sequence.settle(layer)  # so that it certainly reaches the device
os.kill(os.getpid(), 9)
"""


def killed_after(folder: Path, granularity: str, what: str) -> None:
    ran = python(_KILLED, str(folder), str(TESTS), granularity, what)
    assert ran.returncode == -9, ran.stderr


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("reference.append(sequence, 200)", None),
        ("reference.append(sequence, 100); store.flush()", 100),
        # The tail's chunk is written again, full, over the one that the record names.
        (
            "reference.append(sequence, 100); store.flush(); reference.append(sequence, 300)",
            100,
        ),
        # Cut off and written anew, over what the record named: so the record went first.
        (
            "reference.append(sequence, 400); store.flush(); reference.truncate(sequence, 120);"
            "reference.append(sequence, 250)",
            120,
        ),
        ("reference.append(sequence, 400); store.flush(); reference.truncate(sequence, 70)", 70),
    ],
)
def test_after_a_kill_flushed_tokens_are_there_and_no_others(folder, granularity, what, kept):
    killed_after(folder, granularity, what)
    with reopen(folder) as store:
        if kept is None:
            assert store.sequences() == []
            assert store.stats()["used_nbytes"] == 0
            return
        reference = Reference(shape_of())
        first = {"reference": reference, "sequence": store.sequence("s")}
        assert first["sequence"].tokens() == kept
        # The same tokens once more: the reference's are drawn in one order.
        with open_store("ram://", capacity="64 MiB") as scratch:
            first |= {"store": scratch, "sequence": scratch.sequence("s", shape_of())}
            exec(what, first)
        reference.layers = [(k[:, :, :kept], v[:, :, :kept]) for k, v in reference.layers]
        reference.check(store.sequence("s"))
        check_books(store)


def test_kills_amid_appends_truncations_and_flushes(folder):
    kills = rounds(30, 200)
    counts = kill_loop(folder, kills, "sequences", 3)
    assert counts["killed"] == kills


@pytest.mark.parametrize("tokens", [60, 130, 300])
def test_a_crash_before_the_record_of_a_truncation_leaves_the_old_tokens(folder, tokens):
    # The truncation's record cannot be committed; the device must still hold what the old one says.
    with open_store(folder / "kv", capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [400])
        store.flush()
        lock = open_index_writer(folder / "kv" / "index.sqlite")
        try:
            with pytest.raises(SpdkKvError):
                sequence.truncate(tokens)
            assert sequence.tokens() == tokens
            k, v = reference.tokens(100)
            # An append would overwrite what the old record names: refused like the truncation.
            with pytest.raises(SpdkKvError):
                sequence.append(0, k, v)
            crashed = folder / "crashed"
            subprocess.run(["cp", "-r", "--sparse=always", folder / "kv", crashed], check=True)
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        for layer in range(2):
            sequence.append(layer, k, v)
        assert sequence.tokens() == tokens + 100
    with reopen(crashed) as store:
        reference.check(store.sequence("s"))


def open_index_writer(path: Path):
    """A transaction of another program, which keeps ours out."""
    import sqlite3

    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_damaged_tail_is_found_at_reopening_and_the_sequence_forgotten(folder, granularity):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, _ = begun(store, granularity, [300])
        store.flush()
        contents = sequence._layers[1].contents
        last, at = contents.extents[-1], contents.stored_nbytes + 10
        ((offset, _),) = contents.ranges(last, at, at + 1)
    with open(folder / "data", "r+b") as data:
        data.seek(offset)
        data.write(b"\xff\x00\xff")
    with reopen(folder) as store:
        with pytest.raises(CorruptionError, match="last chunk"):
            store.sequence("s")
        assert store.stats()["corruptions"] == 1
        with pytest.raises(KeyNotFound):
            store.sequence("s")
        _, reference = begun(store, granularity, [10])
        check_books(store)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))


def test_a_write_that_fails_ends_its_layer_and_keeps_nothing_else_from_lasting(folder):
    with open_store(folder / "kv", capacity="64 MiB", engine="pagecache") as store:
        sequence, _ = begun(store, "layer", [10])
        store.flush()
        other = store.sequence("other", shape_of())
        kept = Reference(shape_of())
        kept.append(other, 20)
        store.put("blob", noise(10))
        # The descriptor becomes one that cannot write, as a drive that turned read-only.
        writable = os.dup(store.engine.fd)
        readable = os.open(folder / "kv" / "data", os.O_RDONLY)
        os.dup2(readable, store.engine.fd)
        k = torch.zeros(2, 3, 200, 20, dtype=torch.bfloat16)
        sequence.append(0, k, k)
        for call in (lambda: sequence.settle(0), lambda: sequence.read(0)):
            with pytest.raises(DeviceError, match="EBADF"):
                call()
        os.dup2(writable, store.engine.fd)
        os.close(writable)
        os.close(readable)
        for call in (lambda: sequence.append(0, k, k), lambda: sequence.truncate(0), store.flush):
            with pytest.raises(DeviceError, match="EBADF"):
                call()
        sequence.append(1, k, k)  # the other layer goes on
        copy = ["cp", "-r", "--sparse=always", folder / "kv", folder / "copy"]
        subprocess.run(copy, check=True)
        sequence.delete()
    with reopen(folder / "copy") as store:
        assert "blob" in store
        kept.check(store.sequence("other"))
        assert store.sequence("s").tokens() == 10
    with reopen(folder / "kv") as store:
        assert store.sequences() == ["other"]


def test_an_append_says_that_an_earlier_one_was_not_written(folder):
    with open_store(folder, capacity="64 MiB", engine="pagecache") as store:
        sequence, _ = begun(store, "layer", [10])
        writable = os.dup(store.engine.fd)
        readable = os.open(folder / "data", os.O_RDONLY)
        os.dup2(readable, store.engine.fd)
        k = torch.zeros(2, 3, 200, 20, dtype=torch.bfloat16)
        sequence.append(0, k, k)
        (write,) = sequence._layers[0].writer.pending
        wait_until(lambda: write.transfer.done)
        os.dup2(writable, store.engine.fd)
        os.close(writable)
        os.close(readable)
        with pytest.raises(DeviceError, match="EBADF"):
            sequence.append(0, k[:, :, :1], k[:, :, :1])
        assert sequence.tokens(0) == 210
        sequence.delete()


def test_another_segment_size_reads_the_same_sequence_or_says_which_would(folder):
    with open_store(folder, capacity="64 MiB", segment="64 KiB") as store:
        _, reference = begun(store, "layer", [300])
    with (
        reopen(folder, segment="20 KiB") as store,
        pytest.raises(ShapeMismatch, match="segments that are a multiple"),
    ):
        store.sequence("s")
    with reopen(folder, segment="1 MiB") as store:
        reference.check(store.sequence("s"))
    with open_store(folder / "odd", capacity="64 MiB", segment="20 KiB") as store:
        sequence, reference = begun(store, "layer", [300])
        reference.check(sequence)
        reference.truncate(sequence, 77)
        reference.check(sequence)


def test_a_sequence_of_one_dtype_per_model_lasts_beside_others(folder):
    shapes = {
        name: shape_of(dtype=dtype, max_tokens=200)
        for name, dtype in [("a", torch.float16), ("b", torch.float8_e4m3fn), ("c", torch.int8)]
    }
    references = {}
    with open_store(folder, capacity="64 MiB") as store:
        for name, shape in shapes.items():
            references[name] = Reference(shape)
            references[name].append(store.sequence(name, shape, granularity="head"), 150)
    with reopen(folder) as store:
        assert store.sequences() == [*"abc"]
        for name, reference in references.items():
            reference.check(store.sequence(name))
