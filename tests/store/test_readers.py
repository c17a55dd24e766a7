"""A store that is open read_only: what it finds, what it takes up, and what it refuses."""

from __future__ import annotations

import copy
import errno
import io
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spdk_kv
from spdk_kv.errors import (
    ClosedError,
    CorruptionError,
    DeviceGone,
    EngineUnavailable,
    KeyNotFound,
    ReadOnlyStore,
    ShapeMismatch,
    StoreLocked,
    StoreMismatch,
)
from spdk_kv.store import KVStore
from spdk_kv.store.reader.sequences import SequenceReader
from store.helpers import (
    FILE_ENGINES,
    assert_same,
    extent_of,
    flip,
    folder_fixture,
    open_store,
    payload,
    reopen,
    version_of,
)
from support.options import grouped
from support.waiting import PATIENCE_S

folder = folder_fixture
SHAPE = spdk_kv.KVShape(3, 2, 40, torch.float16, 400, batch=2)


def open_reader(where: Path | str, **options: Any) -> KVStore:
    small = {"depth": 4, "segment": "64 KiB", "staging": "8 MiB"} | options
    return spdk_kv.open(where, read_only=True, **grouped(small))


@pytest.fixture
def writer(folder: Path) -> Iterator[KVStore]:
    with open_store(folder) as store:
        yield store


@pytest.fixture(params=[*FILE_ENGINES])
def reader(writer: KVStore, folder: Path, request: pytest.FixtureRequest) -> Iterator[KVStore]:
    with open_reader(folder, engine=request.param) as store:
        yield store


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, 2, count, 40, generator=made).to(torch.float16)
    return k, v


def prompt(store: KVStore, name: str, count: int, seed: int = 0) -> spdk_kv.Sequence:
    sequence = store.sequence(name, SHAPE)
    for layer in range(SHAPE.layers):
        sequence.append(layer, *tokens(count, seed + layer))
    store.flush()
    return sequence


def runs_of(store: KVStore, name: str) -> set[int]:
    """Where the bytes of a sequence lie."""
    record = store.catalog.records.sequences[name]
    return {run for piece in record.pieces for run in piece.runs}


# -- what it finds --------------------------------------------------------------------------------


def test_it_has_the_last_flush_and_takes_up_later_ones(writer, folder):
    writer.put_many({str(n): payload(str(n), 1) for n in range(5)})
    writer.put("none", np.empty((0, 3), np.int16))
    writer.flush()
    writer.put("later", payload("later", 1))
    with open_reader(folder) as reader:
        assert (reader.read_only, writer.read_only) == (True, False)
        assert (reader.uuid, reader.location) == (writer.uuid, writer.location)
        assert reader.keys() == ["0", "1", "2", "3", "4", "none"]
        assert len(reader) == 6
        assert reader.keys("n") == ["none"]
        for n in range(5):
            assert version_of(str(n), reader.get(str(n))) == 1
        assert_same(reader.get("none", as_numpy=True), np.empty((0, 3), np.int16))
        assert "later" not in reader
        with pytest.raises(KeyNotFound, match="no blob 'later'"):
            reader.get("later")
        assert not reader.refresh()
        writer.flush()
        # Found without being asked to look: by a get, by contains, by one of several.
        assert version_of("later", reader.get("later")) == 1
        writer.put("more", payload("more", 1))
        writer.flush()
        assert "more" in reader
        writer.put_many({"0": payload("0", 2), "last": payload("last", 1)})
        writer.delete("1")
        writer.flush()
        found = reader.get_many(["0", "last"], as_numpy=True)
        assert [version_of(key, each) for key, each in zip(("0", "last"), found, strict=True)] == [
            2,
            1,
        ]
        assert "1" not in reader
        writer.delete("2")
        writer.flush()
        assert "2" in set(reader.keys())
        assert reader.refresh()
        assert "2" not in set(reader.keys())
        assert not reader.refresh()
        assert not writer.refresh()


def test_every_way_to_get(reader, writer):
    tensor = torch.arange(40_000, dtype=torch.float32).reshape(200, 200)
    writer.put_many({"a": tensor, "b": tensor.to(torch.bfloat16)})
    writer.flush()
    assert_same(reader.get("a"), tensor)
    out = torch.empty_like(tensor)
    assert reader.get("a", out=out) is out
    assert_same(out, tensor)
    assert_same(reader.get("a", as_numpy=True, timeout_s=PATIENCE_S), tensor.numpy())
    assert_same(reader.get_async("b").result(PATIENCE_S), tensor.to(torch.bfloat16))
    assert_same(
        reader.get_many_async(["b", "a"], timeout_s=PATIENCE_S).result(PATIENCE_S)[1], tensor
    )
    with pytest.raises(ShapeMismatch):
        reader.get("a", out=torch.empty(3))
    with pytest.raises(ShapeMismatch):
        reader.get_async("a", out=torch.empty(3))
    with pytest.raises(KeyNotFound):
        reader.get_async("c")
    held = reader.stats()
    assert (held["blobs"], held["sequences"], held["hits"]) == (2, 0, 8)
    same = ("capacity_nbytes", "used_nbytes", "free_nbytes", "largest_free_nbytes")
    assert [held[name] for name in same] == [writer.stats()[name] for name in same]


def test_what_was_used_anew_is_read_again_and_never_others_bytes(reader, writer):
    """The writer puts other bytes where the reader looks for its own."""
    for version in range(1, 30):
        writer.put_many({key: payload(key, version, 300_000) for key in "ab"})
        writer.flush()
        if version == 1:
            reader.refresh()
            places = {extent_of(writer, key)[0] for key in "ab"}
        offset = extent_of(writer, "a")[0]
        if version > 1 and offset in places:
            assert version_of("b", reader.get("b", as_numpy=True)) == version
            assert (
                version_of("a", reader.get_async("a", as_numpy=True).result(PATIENCE_S)) == version
            )
            places = {extent_of(writer, key)[0] for key in "ab"}
    assert reader.stats()["corruptions"] == 0
    reader.refresh()
    offset = extent_of(writer, "a")[0]
    writer.delete("a")
    writer.flush()
    for n in range(52):
        writer.put(str(n), payload(str(n), 1, 300_000))
    assert offset in {extent_of(writer, key)[0] for key in list(writer.keys())}
    with pytest.raises(KeyNotFound):
        reader.get("a")


def test_a_data_file_that_became_shorter_under_a_reader_is_no_damage(reader, writer, folder):
    writer.put_many({str(n): payload(str(n), 1, 500_000) for n in range(20)})
    writer.flush()
    reader.refresh()
    last = max(range(20), key=lambda n: extent_of(writer, str(n))[0])
    size = (folder / "data").stat().st_size
    for n in range(20):
        if n != 3:
            writer.delete(str(n))
    assert writer.compact() > 0
    assert (folder / "data").stat().st_size < size
    with pytest.raises(KeyNotFound):
        reader.get(str(last))
    assert version_of("3", reader.get("3")) == 1


def test_damage_is_damage_and_nothing_is_forgotten(reader, writer, folder):
    writer.put_many({"a": payload("a", 1), "b": payload("b", 1)})
    writer.flush()
    reader.refresh()
    offset = extent_of(writer, "a")[0]
    flip(folder / "data", offset + 100)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"'a'.*a reader forgets nothing"):
            reader.get("a")
        with pytest.raises(CorruptionError, match=r"'a'.*a reader forgets nothing"):
            reader.get_async("a").result(PATIENCE_S)
    with pytest.raises(CorruptionError):
        reader.get_many(["b", "a"])
    assert version_of("b", reader.get("b")) == 1
    assert "a" in reader
    assert reader.stats()["corruptions"] == 5
    flip(folder / "data", offset + 100)
    assert version_of("a", reader.get("a")) == 1


# -- sequences ------------------------------------------------------------------------------------


def same_tokens(sequence: spdk_kv.Sequence, count: int, seed: int = 0) -> bool:
    found = [sequence.read(layer) for layer in range(SHAPE.layers)]
    wanted = [tokens(count, seed + layer) for layer in range(SHAPE.layers)]
    return all(
        torch.equal(a, b)
        for f, w in zip(found, wanted, strict=True)
        for a, b in zip(f, w, strict=True)
    )


def test_a_sequence_is_read_and_stays_as_it_is_until_a_refresh(reader, writer):
    written = prompt(writer, "s", 100)
    found = reader.sequence("s")
    assert isinstance(found, spdk_kv.Sequence)
    assert reader.sequence("s", SHAPE) is found
    assert (found.name, found.shape, found.granularity) == ("s", SHAPE, "layer")
    assert (found.temporary, found.deleted, found.dirty) == (False, False, False)
    assert [found.tokens(layer) for layer in range(3)] == [100] * 3
    assert found.nbytes == written.nbytes
    assert same_tokens(found, 100)
    k, _ = found.read_async(1, tokens=slice(10, 20)).result(PATIENCE_S)
    assert torch.equal(k, tokens(100, 1)[0][:, :, 10:20])
    assert torch.equal(found.read(2, heads=[1])[1], tokens(100, 2)[1][:, 1:])
    found.prefetch([0, 1])
    assert same_tokens(found, 100)
    found.settle(0)
    found.set_weight([0], 2.0)
    for layer in range(SHAPE.layers):
        written.append(layer, *tokens(50, 9))
    writer.put("other", payload("other", 1))
    writer.flush()
    assert version_of("other", reader.get("other")) == 1  # which takes up the news, for blobs
    assert found.tokens() == 100
    assert same_tokens(found, 100)
    reader.refresh()
    assert found.tokens() == 150
    assert torch.equal(found.read(1)[0][:, :, 100:], tokens(50, 9)[0])
    assert reader.sequences() == ["s"]
    written.note, written.pinned = b"of what", True
    written.fork("child", tokens=60)
    writer.flush()
    assert (found.note, found.pinned) == (b"", False)
    assert reader.sequence_note("child") == b"of what"
    reader.refresh()
    assert (found.tokens(), found.note, found.pinned) == (150, b"of what", True)
    child = reader.sequence("child", SHAPE)
    assert torch.equal(child.read(2)[1], tokens(100, 2)[1][:, :, :60])
    with pytest.raises(KeyNotFound):
        reader.sequence_note("none")
    del child
    entries = reader.why()
    assert len(entries) == 2 * SHAPE.layers


def test_a_sequence_that_changed_under_a_reader_is_a_miss(reader, writer):
    written = prompt(writer, "s", 300)
    found = reader.sequence("s")
    assert same_tokens(found, 300)
    written.truncate(0)
    for layer in range(SHAPE.layers):
        written.append(layer, *tokens(300, 50 + layer))
    writer.flush()
    for _ in range(2):
        with pytest.raises(KeyNotFound, match=r"'s' was changed by its writer.*refresh\(\)"):
            found.read(1)
    reader.refresh()
    assert same_tokens(found, 300, 50)
    written.delete()
    writer.flush()
    prompt(writer, "t", 300, 70)
    assert runs_of(writer, "t") & {run for each in found._state.record.pieces for run in each.runs}
    with pytest.raises(KeyNotFound, match="'s' was deleted by its writer"):
        found.read(0)
    reader.refresh()
    with pytest.raises(KeyNotFound, match="no sequence 's'"):
        found.read(0)
    with pytest.raises(KeyNotFound, match="no sequence 's'"):
        reader.sequence("s")
    assert same_tokens(reader.sequence("t"), 300, 70)


def test_a_damaged_sequence_is_damage(reader, writer, folder):
    prompt(writer, "s", 400)
    flip(folder / "data", min(runs_of(writer, "s")) + 100)
    found = reader.sequence("s")
    for _ in range(2):
        with pytest.raises(CorruptionError, match="not those that were appended"):
            found.read(0)
    assert torch.equal(found.read(1)[0], tokens(400, 1)[0])
    assert reader.sequences() == ["s"]
    with pytest.raises(ShapeMismatch):
        reader.sequence("s", spdk_kv.KVShape(1, 2, 40, torch.float16, 400))
    with pytest.raises(ShapeMismatch):
        reader.sequence("s", granularity="head")


def test_a_sequence_reader_has_every_call_of_a_sequence():
    """One that is added to Sequence would find none of its parts here, unless it is made of others
    of them."""
    for kind in (spdk_kv.Sequence, *spdk_kv.Sequence.__mro__[1:-2]):
        for name in vars(kind):
            if not name.startswith("_") and name not in ("read_async", "read_groups"):
                assert name in vars(SequenceReader), name


# -- what it refuses ------------------------------------------------------------------------------


def test_every_change_is_refused_and_nothing_changes(reader, writer, folder):
    writer.put("a", payload("a", 1))
    written = prompt(writer, "s", 10)
    reader.refresh()
    found = reader.sequence("s")
    before = {each.name: each.stat().st_mtime_ns for each in folder.iterdir()}
    k, v = tokens(1)
    changes = {
        "put": lambda: reader.put("b", torch.ones(3)),
        "put of nothing": lambda: reader.put("b", torch.ones(0)),
        "put_many": lambda: reader.put_many({}),
        "put_async": lambda: reader.put_async("b", torch.ones(3)),
        "put_many_async": lambda: reader.put_many_async({"a": torch.ones(3)}),
        "delete": lambda: reader.delete("a"),
        "flush": reader.flush,
        "flush_async": reader.flush_async,
        "flush_in_background": reader.flush_in_background,
        "sequence": lambda: reader.sequence("new", SHAPE),
        "append": lambda: found.append(0, k, v),
        "append_async": lambda: found.append_async(0, k, v),
        "truncate": lambda: found.truncate(0),
        "reorder": lambda: found.reorder([1, 0]),
        "delete of s": found.delete,
        "fork": lambda: found.fork("other"),
        "note": lambda: setattr(found, "note", b"x"),
        "pinned": lambda: setattr(found, "pinned", True),
        "trim": reader.trim,
        "compact": reader.compact,
    }
    for name, make in changes.items():
        with pytest.raises(ReadOnlyStore, match="read_only"):
            make()
        assert issubclass(ReadOnlyStore, spdk_kv.SpdkKvError), name
    with pytest.raises(KeyNotFound):
        reader.sequence("new")
    assert not reader.dirty
    assert {each.name: each.stat().st_mtime_ns for each in folder.iterdir()} == before
    assert written.tokens() == 10
    assert version_of("a", reader.get("a")) == 1


def test_a_closed_reader_is_closed(writer, folder):
    prompt(writer, "s", 10)
    reader = open_reader(folder)
    found = reader.sequence("s")
    reader.close()
    reader.close()
    calls = [reader.refresh, reader.keys, reader.sequences, reader.why, reader.stats, found.tokens]
    calls += [
        lambda: reader.get("a"),
        lambda: reader.put("a", torch.ones(1)),
        lambda: "a" in reader,
    ]
    calls += [lambda: found.read(0), lambda: found.truncate(0), lambda: reader.sequence("s")]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    assert len(reader) == 0
    assert "closed" in repr(reader)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"verify": False}, "needs verify=True: .* only checksums"),
        ({"create": True}, "create=True begins a store"),
        ({"capacity": "1 MiB"}, "capacity= changes a store"),
        ({"mmap": True, "engine": "pagecache"}, "excludes mmap=True"),
        ({"index_dir": "/tmp"}, "for stores on drives"),
        ({"engine": "what"}, "engine 'what' does not serve"),
    ],
)
def test_options_that_make_no_sense_are_refused(writer, folder, options, says):
    with pytest.raises(ValueError, match=says):
        open_reader(folder, **options)


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("ram://", ValueError),
        ("null://", ValueError),
        ("spdk://0000:01:00.0/1", EngineUnavailable),
        ("spdk+tcp://127.0.0.1:1/nqn.2016-06.io.spdk:none/1", EngineUnavailable),
        ("ng:///dev/ng0n1", EngineUnavailable),
    ],
)
def test_drives_of_one_process_are_refused(uri, error, tmp_path):
    options = {} if error is ValueError else {"index_dir": tmp_path / "index"}
    with pytest.raises(error):
        open_reader(uri, **options)
    assert not (tmp_path / "index").exists()


def test_where_there_is_no_store_none_is_begun(tmp_path):
    with pytest.raises(StoreMismatch, match=r"no store at .*read_only=True begins none"):
        open_reader(tmp_path / "none")
    with pytest.raises(StoreMismatch, match="no store"):
        open_reader(tmp_path)
    (tmp_path / "data").write_bytes(bytes(2 << 20))
    with pytest.raises(StoreMismatch, match=r"no index .*index\.sqlite"):
        open_reader(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


def test_what_does_not_belong_together_is_refused(tmp_path):
    for name in "ab":
        with open_store(tmp_path / name) as store:
            store.put("k", payload("k", 1))
    (tmp_path / "a" / "data").replace(tmp_path / "b" / "data")
    with pytest.raises(StoreMismatch, match="the data is that of store"):
        open_reader(tmp_path / "b")
    with open(tmp_path / "b" / "data", "r+b") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(StoreMismatch, match="the data carries no superblock"):
        open_reader(tmp_path / "b")


def test_an_old_index_is_refused_beside_newer_data(tmp_path):
    with open_store(tmp_path) as store:
        store.put("k", payload("k", 1))
    old = {each: each.read_bytes() for each in tmp_path.iterdir() if "index" in each.name}
    with reopen(tmp_path) as store:
        store.put("k", payload("k", 2))
    for each, content in old.items():
        each.write_bytes(content)
    with pytest.raises(StoreMismatch, match="old copy"):
        open_reader(tmp_path)


def test_a_store_that_was_replaced_is_gone(writer, folder):
    writer.put("a", payload("a", 1))
    writer.flush()
    with open_reader(folder) as reader:
        (folder / "index.sqlite").rename(folder / "moved")
        assert version_of("a", reader.get("a")) == 1
        for look in (reader.refresh, lambda: reader.get("b"), lambda: "b" in reader):
            with pytest.raises(DeviceGone, match=r"removed or renamed.*open it again"):
                look()
        (folder / "moved").rename(folder / "index.sqlite")
        assert "b" not in reader


# -- processes and objects ------------------------------------------------------------------------


def test_a_reader_and_a_writer_do_not_know_each_other(writer, folder):
    writer.put("a", payload("a", 1))
    writer.flush()
    with open_reader(folder) as first, open_reader(folder) as second:
        with pytest.raises(StoreLocked):
            reopen(folder)
        assert version_of("a", first.get("a")) == version_of("a", second.get("a")) == 1
        writer.close()
        with reopen(folder) as again:
            again.put("b", payload("b", 1))
            again.flush()
            assert version_of("b", second.get("b")) == 1
    assert sorted(each.name for each in folder.iterdir()) == [
        "data", "index.sqlite", "index.sqlite-blobs", "index.sqlite-commits", "lock",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "how", [pickle.dumps, copy.copy, copy.deepcopy, lambda it: torch.save(it, io.BytesIO())]
)
@pytest.mark.parametrize("what", ["store", "reader", "sequence", "sequence of a reader"])
def test_none_is_pickled_or_copied(writer, folder, what, how):
    written = prompt(writer, "s", 10)
    with open_reader(folder) as reader:
        found = {
            "store": writer,
            "reader": reader,
            "sequence": written,
            "sequence of a reader": reader.sequence("s"),
        }[what]
        with pytest.raises(TypeError, match=r"open .* in the worker with read_only=True"):
            how(found)


def test_a_child_of_a_fork_is_told_to_open_its_own(writer, folder):
    with open_reader(folder) as reader:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                for store in (writer, reader):
                    try:
                        store.get("a")
                    except ClosedError as error:
                        os.write(write_end, f"{error}\n".encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write_end)
        with open(read_end) as said:
            lines = said.read().splitlines()
        assert len(lines) == 2
        assert all("open it in the child, with read_only=True" in line for line in lines)
        assert len(reader) == 0


def test_where_nothing_can_be_written_create_false_reads(writer, folder, monkeypatch, caplog):
    """The system's answer on a read-only filesystem, which is real in test_readers_mounts.py."""
    writer.put("a", payload("a", 1))
    writer.close()
    opened = os.open

    def refuse(path: Any, flags: int, *mode: Any, **more: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", refuse)
    for options in (
        {},
        {"create": None},
        {"create": False, "verify": False},
        {"create": False, "capacity": "16 MiB"},
    ):
        with pytest.raises(spdk_kv.DeviceError, match="read-only"):
            open_store(folder, **{"capacity": None} | options)
    with caplog.at_level(logging.WARNING), reopen(folder, create=False) as store:
        assert store.read_only
        assert version_of("a", store.get("a")) == 1
    assert "opened read_only" in caplog.text
