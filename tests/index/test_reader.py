"""An index read beside its writer: a whole state, the newest one, no lock and no trace."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spdk_kv.errors import CorruptionError, DeviceError, DeviceGone, DeviceTimeout, StoreMismatch
from spdk_kv.index import (
    BlobRecord,
    Index,
    IndexReader,
    IndexSnapshot,
    PieceRecord,
    SequenceRecord,
    descriptors,
    forks,
    snapshot,
)
from spdk_kv.types import KVShape
from support.waiting import PATIENCE_S

SHAPE = KVShape(2, 1, 64, "float32", 100, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    path.parent.mkdir()
    with closing(Index(path)) as index:
        yield index


@pytest.fixture
def reader(index: Index, path: Path) -> Iterator[IndexReader]:
    with closing(IndexReader(str(path))) as reader:
        yield reader


def blob(number: int) -> BlobRecord:
    return BlobRecord(number * 4096, 10 + number, "uint8", (10 + number,), number)


def sequence(number: int) -> SequenceRecord:
    piece = PieceRecord((0,), (16,), tuple(4096 * (number % 1000 + run) for run in range(4)))
    return SequenceRecord(SHAPE, "layer", 4096, (piece,), (1, 2), (bytes(4),) * 4, b"map")


def assert_same(reader: IndexReader, index: Index) -> None:
    with closing(reader.take()) as found:
        assert (found.uuid, found.commits) == (index.uuid, index.commits)
        assert found.generation == index.generation
        blobs, sequences = dict(index.load_blobs()), dict(index.load_sequences())
        assert dict(found.load_blobs()) == blobs
        assert found.blob_keys() == list(blobs)
        assert dict(found.load_sequences()) == sequences
        assert found.sequence_names() == sorted(sequences)
        assert found.count_blobs() == len(blobs)
        for name in ("k 3", "\udcff", "never"):
            assert found.blob(name) == blobs.get(name)
            assert found.sequence(name) == sequences.get(name)
        assert found.get_meta("uuid") == index.uuid
        assert found.get_meta("never") is None


# -- one state ------------------------------------------------------------------------------------


def test_a_snapshot_is_what_the_index_holds_whatever_was_committed(
    index: Index, reader: IndexReader, path: Path
) -> None:
    rng = random.Random(1)
    salts = set()
    for step in range(60):
        # Large enough that the log is copied into the file, and begun anew, some times.
        names = [f"k {rng.randrange(20_000)}" for _ in range(rng.choice((1, 30, 1500)))]
        changes = {
            name: blob(rng.randrange(1000)) if rng.random() < 0.8 else None for name in names
        }
        sequences = {
            f"s {rng.randrange(9)}": sequence(step) if step % 3 else None,
            "\udcff": sequence(1),
        }
        index.commit(changes | {"\udcff": blob(step)}, sequences)
        if step % 20 == 7:
            index.touch_order(sorted(names))
            index.generation = step
        if step % 20 == 13:
            index._empty_log()
        assert_same(reader, index)
        salts.add(Path(f"{path}-wal").read_bytes()[16:24])
    assert len(salts) > 3


def test_a_snapshot_of_a_closed_index_is_the_file(path: Path) -> None:
    path.parent.mkdir()
    with closing(Index(path)) as index:
        index.commit({"a": blob(1)}, {})
    assert not Path(f"{path}-wal").exists()
    with closing(IndexReader(str(path))) as reader, closing(reader.take()) as found:
        assert dict(found.load_blobs()) == {"a": blob(1)}


def test_a_snapshot_stays_as_it_was(index: Index, reader: IndexReader) -> None:
    index.commit({"a": blob(1)}, {})
    with closing(reader.take()) as old:
        assert not reader.has_news(old.commits)
        index.commit({"a": None, "b": blob(2)}, {})
        assert reader.has_news(old.commits)
        assert dict(old.load_blobs()) == {"a": blob(1)}
        with closing(reader.take()) as new:
            assert dict(new.load_blobs()) == {"b": blob(2)}
            assert not reader.has_news(new.commits)


def recovered(folder: Path) -> tuple[int, list[str]] | str:
    """Commits and keys that SQLite finds in a copy of the files after a crash, or its verdict."""
    import sqlite3

    with closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        try:
            (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if verdict != "ok":
                return "damaged"
            (commits,) = connection.execute(
                "SELECT value FROM meta WHERE name='commits'"
            ).fetchone()
            keys = connection.execute("SELECT key FROM blobs ORDER BY id").fetchall()
        except sqlite3.Error:
            return "damaged"
    return int(commits), [key.decode() for (key,) in keys]


def snapped(path: Path) -> tuple[int, list[str]] | str:
    with closing(IndexReader(str(path))) as reader:
        image = reader._copy()
        assert image is not None
        try:
            with closing(IndexSnapshot(str(path), image[0])) as found:
                return found.commits, found.blob_keys()
        except CorruptionError:
            return "damaged"


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_log_ends_where_sqlite_lets_it_end(
    index: Index, path: Path, tmp_path: Path, how: str
) -> None:
    rng = random.Random(how)
    for step in range(40):
        index.commit(
            {f"k {rng.randrange(60)}": blob(step) for _ in range(rng.randrange(1, 20))}, {}
        )
    log = Path(f"{path}-wal").read_bytes()
    states = set()
    for case in range(60):
        folder = tmp_path / f"case {case}"
        folder.mkdir()
        for suffix in ("", "-commits"):
            shutil.copy(f"{path}{suffix}", folder / f"index.sqlite{suffix}")
        damaged = bytearray(log)
        at = rng.randrange(36) if case < 10 else rng.randrange(len(log))
        if how == "cut":
            del damaged[at:]
        else:
            damaged[at] ^= 1 << rng.randrange(8)
        (folder / "index.sqlite-wal").write_bytes(damaged)
        found = snapped(folder / "index.sqlite")
        # Afterwards: it moves the log into the file.
        assert found == recovered(folder)
        states.add(str(found))
        shutil.rmtree(folder)
    assert len(states) > 20


def test_words_of_either_order_are_summed(tmp_path: Path) -> None:
    """A log that a machine of the other byte order wrote, its sums made step by step."""
    import struct

    from spdk_kv.index.log import apply_log

    def summed(data: bytes, order: str, a: int, b: int) -> tuple[int, int]:
        words = struct.unpack(f"{order}{len(data) // 4}I", data)
        for x, y in zip(words[::2], words[1::2], strict=True):
            a = (a + x + b) & 0xFFFFFFFF
            b = (b + y + a) & 0xFFFFFFFF
        return a, b

    for order, magic in (("<", 0x377F0682), (">", 0x377F0683)):
        head = struct.pack(">6I", magic, 3007000, 512, 1, 0xDEADBEEF, 0xFFFFFFF0)
        sums = summed(head, order, 0, 0)
        log = head + struct.pack(">2I", *sums)
        pages = [random.Random(number).randbytes(512) for number in range(4)]
        for number, (page, ends) in enumerate(zip(pages, (0, 3, 0, 0), strict=True), 2):
            frame = struct.pack(">2I", number, ends)
            sums = summed(frame + page, order, *sums)
            log += frame + head[16:24] + struct.pack(">2I", *sums) + page
        image = bytearray(b"1" * 512 + b"2" * 512)
        apply_log(image, log)
        assert image == b"1" * 512 + pages[0] + pages[1]  # the last two are not committed


def change(index: Index, version: int) -> None:
    index.commit({f"k {n}": blob(version) for n in range(3000)}, {})


def begun_anew(index: Index) -> None:
    """All of the log is in the file, and another one is begun."""
    index._empty_log()
    change(index, 2)


def copied_and_begun_anew(index: Index) -> None:
    """As SQLite does it by itself, the log keeping its size."""
    assert index._connection is not None
    index._connection.execute("PRAGMA wal_checkpoint(RESTART)")
    change(index, 2)


def copied(index: Index) -> None:
    """Into the file, while the log is as it was."""
    change(index, 2)
    assert index._connection is not None
    index._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")


@pytest.mark.parametrize("event", [begun_anew, copied_and_begun_anew, copied, change])
def test_what_happens_amid_a_copy_leaves_it_of_one_state(
    index: Index, reader: IndexReader, event: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(index, 1)
    index._empty_log()
    change(index, 1)
    events = [partial(event, index) if event is not change else partial(change, index, 2)]
    in_steps(monkeypatch, reader, events)
    with closing(reader.take()) as found:
        assert {record.crc for _, record in found.load_blobs()} == {2}
    assert not events


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_whole_life_of_the_index_amid_a_copy_is_noticed(
    path: Path, is_empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no log before and none after, or an empty one."""
    path.parent.mkdir()

    def live(version: int) -> None:
        with closing(Index(path)) as index:
            change(index, version)

    live(1)
    if is_empty:
        Path(f"{path}-wal").touch()
    with closing(IndexReader(str(path))) as reader:
        events = [partial(live, 2)]
        if is_empty:
            events[0] = lambda: (live(2), Path(f"{path}-wal").touch())  # type: ignore[assignment]
        in_steps(monkeypatch, reader, events)
        with closing(reader.take()) as found:
            assert {record.crc for _, record in found.load_blobs()} == {2}
        assert not events


def in_steps(monkeypatch: pytest.MonkeyPatch, reader: IndexReader, events: list[Any]) -> None:
    """The file is read page by page, and amid that what is in ``events`` happens, once."""
    preadv = os.preadv

    def read(file: int, buffers: list[memoryview], at: int) -> int:
        if file == reader._file:
            buffers = [buffers[0][:4096]]
            if at == 4096 * 10 and events:
                events.pop()()
        return preadv(file, buffers, at)

    monkeypatch.setattr(os, "preadv", read)


def test_what_is_written_faster_than_it_is_read_ends_in_time(
    index: Index, reader: IndexReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(index, 1)
    index._empty_log()
    monkeypatch.setattr("spdk_kv.index.reader._PAUSE_S", 0.0)
    in_steps(monkeypatch, reader, [partial(begun_anew, index) for _ in range(200)])
    monkeypatch.setattr("spdk_kv.index.reader._ATTEMPTS", 5)
    with pytest.raises(DeviceTimeout, match="each of 5 attempts"):
        reader.take()


WRITER = """
import random, sys
from contextlib import closing
from spdk_kv.index import Index, BlobRecord
rng, version = random.Random(0), 0
print("begins", flush=True)
for cycle in range(int(sys.argv[2])):
    with closing(Index(sys.argv[1])) as index:
        for _ in range(rng.choice((1, 5, 60))):
            version += 1
            record = BlobRecord(version * 4096, version, "uint8", (version,), version)
            fill = {f"fill {rng.randrange(5000)}": record for _ in range(rng.choice((0, 100)))}
            index.commit({f"k {n}": record for n in range(40)} | fill, {})
            if rng.random() < 0.05:
                index._empty_log()
"""


def test_beside_a_writer_every_snapshot_is_one_commit(path: Path) -> None:
    path.parent.mkdir()
    with closing(Index(path)) as index:
        index.commit({f"k {n}": blob(0) for n in range(40)}, {})
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), "60"], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"begins\n"
    seen, commits = [], 0
    with closing(IndexReader(str(path))) as reader:
        while writer.poll() is None:
            with closing(reader.take()) as found:
                versions = {found.blob(f"k {n}") for n in range(40)}
                assert len(versions) == 1
                assert found.commits >= commits
                commits = found.commits
                # What it has of the others is not newer, and each row is whole.
                (own,) = versions
                assert own is not None
                others = [each.crc for _, each in found.load_blobs()]
                assert max(others) <= own.crc
                seen.append(own.crc)
        with closing(reader.take()) as found:
            last = found.blob("k 0")
    writer.stdout.close()
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert last is not None
    with closing(Index(path)) as index:
        assert last == dict(index.load_blobs())["k 0"]


# -- no trace -------------------------------------------------------------------------------------


def test_reading_writes_nothing_and_keeps_nothing_from_the_writer(path: Path) -> None:
    path.parent.mkdir()
    index = Index(path)
    index.commit({"a": blob(1)}, {})

    def files() -> dict[str, tuple[int, int]]:
        return {
            each.name: (each.stat().st_mtime_ns, each.stat().st_ctime_ns)
            for each in path.parent.iterdir()
        }

    before = files()
    with closing(IndexReader(str(path))) as reader, closing(reader.take()):
        assert files() == before
        index.close()
        # As without a reader: SQLite has emptied its log and removed it.
        assert sorted(files()) == ["index.sqlite", "index.sqlite-commits"]
        before = files()
        reader.take().close()
    assert files() == before


def posix_locks(path: Path) -> list[str]:
    inode = f":{path.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return [
        line.split(maxsplit=1)[1] for line in lines if f" {os.getpid()} " in line and inode in line
    ]


def test_a_reader_leaves_the_locks_of_an_index_in_its_process_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(Index(path)) as index:
        index.commit({"a": blob(1)}, {})
        before = posix_locks(path)
        assert before
        early = IndexReader(str(path))
        early.take().close()
        early.close()
        assert posix_locks(path) == before
        late = IndexReader(str(path))
        kept = [fd for fds in descriptors._left.values() for fd in fds]
        assert len(kept) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kept[0])
    late.take().close()
    late.close()
    assert not descriptors._left
    assert not descriptors._users


def test_a_child_of_a_fork_reads_while_its_parent_writes(index: Index, path: Path) -> None:
    done = threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            index.commit({f"k {n}": blob(number % 1000) for n in range(20)}, {})

    index.commit({f"k {n}": blob(0) for n in range(20)}, {})
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    with closing(IndexReader(str(path))) as reader:
                        for _ in range(3):
                            with closing(reader.take()) as found:
                                if len({found.blob(f"k {n}") for n in range(20)}) != 1:
                                    raise AssertionError
                    status = 0 if not descriptors._left and not descriptors._users else 2
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        done.set()
        writer.join()


def free_in_a_child(lock: threading.Lock) -> bool:
    pid = os.fork()
    if not pid:
        os._exit(0 if lock.acquire(blocking=False) else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_a_fork_waits_for_a_call_of_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_TIMEOUT_S", 100.0)
    lock, begun = forks.sqlite_lock(), threading.Event()

    def call() -> None:
        with lock:
            begun.set()
            time.sleep(0.2)

    caller = threading.Thread(target=call)
    caller.start()
    assert begun.wait(PATIENCE_S)
    assert free_in_a_child(lock)
    caller.join()
    assert lock.acquire(blocking=False)


def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_TIMEOUT_S", 0.05)
    lock, hung = forks.sqlite_lock(), forks.sqlite_lock()
    with hung:
        assert free_in_a_child(lock)
        assert not free_in_a_child(hung)
    assert lock.acquire(blocking=False)


# -- refusals -------------------------------------------------------------------------------------


def test_a_missing_index_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match=r"no index .*index\.sqlite"):
        IndexReader(str(tmp_path / "index.sqlite"))


def test_lost_commits_are_noticed(index: Index, reader: IndexReader, path: Path) -> None:
    index.commit({"a": blob(1)}, {})
    index._empty_log()
    index.commit({"a": None}, {})
    log = Path(f"{path}-wal")
    kept = log.read_bytes()
    log.write_bytes(b"")
    with pytest.raises(CorruptionError, match="lost 1 commits"):
        reader.take()
    log.write_bytes(kept)
    reader.take().close()
    Path(f"{path}-commits").write_bytes(b"x" * 5000)
    with pytest.raises(CorruptionError, match=r"commits is damaged"):
        reader.take()
    assert reader.has_news(index.commits)  # so that somebody looks, and is told
    Path(f"{path}-commits").unlink()
    with pytest.raises(CorruptionError, match=r"commits is missing"):
        reader.take()


def test_a_damaged_index_is_refused_by_name(path: Path) -> None:
    path.parent.mkdir()
    with closing(Index(path)) as index:
        index.commit({f"k {n}": blob(n) for n in range(500)}, {})
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 4] = os.urandom(4096)
    path.write_bytes(content)
    with (
        closing(IndexReader(str(path))) as reader,
        pytest.raises(CorruptionError, match=r"index\.sqlite"),
    ):
        reader.take()
    path.write_bytes(b"no database")
    with (
        closing(IndexReader(str(path))) as reader,
        pytest.raises(CorruptionError, match=r"index\.sqlite"),
    ):
        reader.take()


def test_an_index_that_was_replaced_is_gone(path: Path) -> None:
    path.parent.mkdir()
    with closing(Index(path)) as index:
        index.commit({}, {})
    with closing(IndexReader(str(path))) as reader:
        path.rename(path.with_name("moved"))
        with pytest.raises(DeviceGone, match=r"was removed or renamed.*open it again"):
            reader.has_news(0)
        shutil.copy(path.with_name("moved"), path)
        with pytest.raises(DeviceGone, match="was replaced"):
            reader.take()


def test_what_cannot_be_read_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)
    with (
        closing(IndexReader(str(path))) as reader,
        pytest.raises(StoreMismatch, match="not a file"),
    ):
        reader.take()
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(DeviceError, match="symbolic links"):
        IndexReader(str(path))


def test_without_deserialize_the_bytes_go_through_a_nameless_file(
    index: Index, reader: IndexReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Python 3.10."""
    index.commit({"a": blob(1)}, {"s": sequence(1)})
    files = []

    def connect(image: bytearray):
        connection = snapshot.connect_file(image)
        (found,) = connection.execute("PRAGMA database_list").fetchall()
        files.append(Path(found[2]))
        return connection

    monkeypatch.setattr(snapshot, "_connect", connect)
    assert_same(reader, index)
    assert files
    assert not any(file.exists() for file in files)
