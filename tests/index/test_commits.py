"""The count of commits: an index that lost some of them is refused, whichever way it lost them."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from spdk_kv.errors import CorruptionError, DeviceError
from spdk_kv.index.commits import CommitCount, create_commit_count
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord

UUID = "0123456789abcdef" * 2
BLOB = BlobRecord(offset=1 << 20, nbytes=4096, dtype="uint8", shape=(4096,), crc=7)

# Overwrites and deletes as it goes, so that every earlier state has other records.
KILLED = """
import os, sys
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
index = Index(sys.argv[1])
index._connection.execute(f"PRAGMA wal_autocheckpoint = {sys.argv[2]}")
for n in range(40):
    put = {f"{n % 7}-{part}": BlobRecord(n, n, "uint8", (n,), part) for part in range(5)}
    index.commit(put | {f"{(n + 3) % 7}-0": None}, {})
os.kill(os.getpid(), 9)
"""
PARTS = ("", "-wal", "-commits")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    with closing(Index(path)) as index:
        yield index


def count_file(path: Path) -> Path:
    return Path(f"{path}-commits")


def blobs(path: Path) -> dict[str, BlobRecord]:
    with closing(Index(path)) as index:
        return dict(index.load_blobs())


def killed(path: Path, checkpoint_pages: int) -> dict[str, bytes]:
    """What a process leaves that was killed with its log full of commits."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(checkpoint_pages)])
    assert done.returncode == -9
    return {part: Path(f"{path}{part}").read_bytes() for part in PARTS}


def put_back(path: Path, files: dict[str, bytes]) -> None:
    for part in (*PARTS, "-shm"):
        Path(f"{path}{part}").unlink(missing_ok=True)
    for part, content in files.items():
        Path(f"{path}{part}").write_bytes(content)


def sqlite_count(path: Path) -> int:
    """The commits that are left of the index, as SQLite by itself sees it."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT value FROM meta WHERE name='commits'").fetchone()[0])


@pytest.mark.parametrize("checkpoint_pages", [1000, 40], ids=["one log", "log begun anew"])
def test_a_flipped_bit_in_the_log_never_brings_back_an_earlier_state(
    path: Path, checkpoint_pages: int
) -> None:
    files = killed(path, checkpoint_pages)
    put_back(path, files)
    whole = blobs(path)
    log, chance, older = files["-wal"], random.Random(5), 0
    for place in [*range(60), *(chance.randrange(len(log)) for _ in range(140))]:
        damaged = bytearray(log)
        damaged[place] ^= 1 << chance.randrange(8)
        put_back(path, files | {"-wal": bytes(damaged)})
        lost = 40 - sqlite_count(path)
        if lost:
            older += 1
            with pytest.raises(CorruptionError, match=rf"index\.sqlite.*lost {lost} commits"):
                Index(path)
            assert Path(f"{path}-wal").read_bytes() == damaged, "what is refused is left alone"
        else:
            assert blobs(path) == whole
    assert older > 50


def test_a_log_cut_short_anywhere_is_refused(path: Path) -> None:
    files = killed(path, 1000)
    log = files["-wal"]
    for nbytes in range(0, len(log), 4096 + 24):
        put_back(path, files | {"-wal": log[:nbytes]})
        with pytest.raises(CorruptionError, match="lost"):
            Index(path)
    put_back(path, {part: content for part, content in files.items() if part != "-wal"})
    with pytest.raises(CorruptionError, match="lost 40 commits"):
        Index(path)
    put_back(path, files)
    assert len(blobs(path)) > 0


def test_an_older_copy_beside_a_newer_count_is_refused(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with closing(Index(path)) as index:
        index.commit({"a": BLOB}, {})
        for part in ("", "-wal"):
            shutil.copy(f"{path}{part}", copy / f"index.sqlite{part}")
        index.commit({"a": None}, {})
    shutil.copytree(copy, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CorruptionError, match=r"lost 1 commits.*old copy"):
        Index(path)
    # The refusal changes nothing, so the next one refuses as well.
    with pytest.raises(CorruptionError, match="lost 1 commits"):
        Index(path)


KILLED_BETWEEN = """
import os, sys
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
index = Index(sys.argv[1])
index.commit({"first": BlobRecord(0, 1, "uint8", (1,), 0)}, {})
index._count.write = lambda commits: os.kill(os.getpid(), 9)
index.commit({"second": BlobRecord(0, 1, "uint8", (1,), 0)}, {})
"""


def test_a_kill_between_commit_and_count_loses_nothing(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(path)])
    assert done.returncode == -9
    behind = count_file(path).read_bytes()
    with closing(Index(path)) as index:
        assert [key for key, _ in index.load_blobs()] == ["first", "second"]
        # What the killed process committed may not be on the medium: no count ahead of it yet.
        assert count_file(path).read_bytes() == behind
        index.set_meta("a", "b")
    with closing(CommitCount(str(count_file(path)), index.uuid, 3)):
        pass
    with pytest.raises(CorruptionError, match="lost 1 commits"):
        CommitCount(str(count_file(path)), index.uuid, 2)


def test_every_kind_of_change_is_counted_and_a_failed_one_is_not(index: Index) -> None:
    index.commit({"a": BLOB}, {})
    index.touch_order(["a"])
    index.set_meta("x", "y")
    index.generation = 3
    with pytest.raises(RuntimeError), index._transaction():
        raise RuntimeError
    assert index.get_meta("commits") == "4"


def test_an_interrupt_after_the_commit_does_not_make_two_commits_count_as_one(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(commits: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index._count, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.commit({"a": BLOB}, {})
    index.commit({"b": BLOB}, {})
    with pytest.raises(CorruptionError, match="lost 1 commits"):
        CommitCount(f"{index.path}-commits", index.uuid, 1)


def test_a_count_that_cannot_be_written_fails_no_commit_and_catches_up(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EIO, "no luck")

    with closing(Index(path)) as index:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(os, "pwrite", refused)
            index.commit({"a": BLOB}, {})
        assert "index.sqlite-commits stays behind" in caplog.text
        index.commit({"b": BLOB}, {})
    assert set(blobs(path)) == {"a", "b"}
    with pytest.raises(CorruptionError, match="lost 2 commits"):
        CommitCount(str(count_file(path)), index.uuid, 0)


def test_a_count_with_one_damaged_copy_still_counts(tmp_path: Path) -> None:
    path = tmp_path / "count"
    create_commit_count(str(path), UUID)
    with closing(CommitCount(str(path), UUID, 5)) as count:
        count.write(5)
    good = path.read_bytes()
    copy = good[4096:]
    assert copy
    assert good[: len(copy)] == copy
    for place in (*range(len(copy)), *range(4096, len(good))):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        CommitCount(str(path), UUID, 5).close()
        with pytest.raises(CorruptionError, match="lost 1 commits"):
            CommitCount(str(path), UUID, 4)


@pytest.mark.parametrize("written", [0, 1])
def test_a_kill_between_the_copies_leaves_the_higher_count(tmp_path: Path, written: int) -> None:
    path = tmp_path / "count"
    create_commit_count(str(path), UUID)
    before = path.read_bytes()
    with closing(CommitCount(str(path), UUID, 5)) as count:
        count.write(5)
    after = path.read_bytes()
    halves = [(after if copy == written else before)[4096 * copy :][:4096] for copy in (0, 1)]
    path.write_bytes(b"".join(halves))
    with pytest.raises(CorruptionError, match="lost 1 commits"):
        CommitCount(str(path), UUID, 4)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "missing"),
        (b"", "damaged"),
        (b"garbage" * 1000, "damaged"),
        (bytes(8192), "damaged"),
        ("another's", "of another index"),
    ],
    ids=["missing", "empty", "garbage", "zeroes", "another's"],
)
def test_an_index_without_a_good_count_is_refused(
    path: Path, tmp_path: Path, content: bytes | str | None, why: str
) -> None:
    with closing(Index(path)) as index:
        index.commit({"a": BLOB}, {})
    count_file(path).unlink()
    if isinstance(content, bytes):
        count_file(path).write_bytes(content)
    elif content:
        create_commit_count(str(count_file(path)), UUID)
    with pytest.raises(CorruptionError, match=rf"index\.sqlite-commits.*{why}.*start empty"):
        Index(path)


def test_a_count_that_is_refused_is_closed(tmp_path: Path) -> None:
    path = str(tmp_path / "count")
    create_commit_count(path, UUID)
    with pytest.raises(CorruptionError) as refused:
        CommitCount(path, "0" * 32, 0)
    held = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert path not in held, refused  # whose traceback would keep it open


def test_a_count_that_cannot_be_opened_is_a_device_error(path: Path) -> None:
    Index(path).close()
    count_file(path).unlink()
    count_file(path).mkdir()
    with pytest.raises(DeviceError, match=r"index\.sqlite-commits"):
        Index(path)


def test_the_count_is_on_the_medium_before_its_index_exists(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(fd: int) -> None:
        fsync(fd)
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))

    def noting_rename(old: str, new: str) -> None:
        assert flushed == [str(count_file(path)), str(path.parent)]
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    Index(path).close()
    assert path.exists()
    assert flushed[-1] == str(path.parent)
