"""The index: round trips, order, kills, rivals, full disks, forks."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    DeviceError,
    SpdkKvError,
    StoreLocked,
)
from spdk_kv.index import database
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
from spdk_kv.index.sequences import PieceRecord, SequenceRecord
from spdk_kv.types import KVShape
from support.rounds import examples

BLOB = BlobRecord(offset=1 << 20, nbytes=4096, dtype="bfloat16", shape=(2, 1024), crc=0xDEADBEEF)
SEQUENCE = SequenceRecord(
    shape=KVShape(layers=2, kv_heads=4, head_dim=64, dtype="float16", max_tokens=128, batch=3),
    granularity="head",
    chunk_nbytes=65536,
    pieces=(
        PieceRecord((0,), (16,), (1 << 20,)),
        PieceRecord((16, 3), (20, 16), (1 << 25, 1 << 26)),
    ),
    tokens=(5, 0),
    checksums=(b"abcd", b""),
    row_map=b"\0\1\2",
    note=b"of a model",
    pinned=True,
)
HOSTILE_KEYS = [
    "",
    "\0",
    "a\0b",
    "../../etc/passwd",
    "\ud800",
    "\udfff\ud800",
    "x" * (1 << 20),
    "é",
]

keys = st.text(st.characters(), max_size=20)
blobs = st.builds(BLOB._replace, offset=st.integers(0, (1 << 63) - 1))
sequences = st.builds(replace, st.just(SEQUENCE), row_map=st.binary(max_size=9000))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    with closing(Index(path)) as index:
        yield index


def load(path: Path) -> tuple[dict[str, BlobRecord], dict[str, SequenceRecord]]:
    with closing(Index(path)) as index:
        return dict(index.load_blobs()), dict(index.load_sequences())


@settings(max_examples=examples(40))
@example(dict.fromkeys(HOSTILE_KEYS, BLOB), dict.fromkeys(HOSTILE_KEYS, SEQUENCE))
@given(st.dictionaries(keys, blobs, max_size=6), st.dictionaries(keys, sequences, max_size=4))
def test_records_come_back_as_committed(
    tmp_path: Path,
    put_blobs: dict[str, BlobRecord],
    put_sequences: dict[str, SequenceRecord],
) -> None:
    path = tmp_path / "index.sqlite"
    with closing(Index(path)) as index:
        index.commit(put_blobs, put_sequences)
        assert dict(index.load_blobs()) == put_blobs
    assert load(path) == (put_blobs, put_sequences)
    with closing(Index(path)) as index:
        index.commit(dict.fromkeys(put_blobs), dict.fromkeys(put_sequences))
    assert load(path) == ({}, {})


def test_a_record_out_of_range_is_refused_and_nothing_of_its_commit_is_kept(index: Index) -> None:
    for bad in ({"bad": BLOB._replace(offset=-1)}, {"bad": BLOB._replace(crc=1 << 32)}):
        with pytest.raises(ValueError, match="field"):
            index.commit({"good": BLOB} | bad, {"sequence": SEQUENCE})
    with pytest.raises(ValueError, match="tokens"):
        index.commit({"good": BLOB}, {"bad": replace(SEQUENCE, tokens=())})
    assert list(index.load_blobs()) == []
    assert list(index.load_sequences()) == []


def test_a_change_that_fails_half_way_is_undone(index: Index) -> None:
    def interrupted() -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    index.commit(dict.fromkeys("ab", BLOB), {})
    with pytest.raises(KeyboardInterrupt):
        index.touch_order(interrupted())
    assert [key for key, _ in index.load_blobs()] == ["a", "b"]
    index.commit({"c": BLOB}, {})


def test_nothing_of_a_deleted_key_stays_in_the_file(path: Path) -> None:
    with closing(Index(path)) as index:
        index.commit({"private-1": BLOB, "other": BLOB}, {"private-2": SEQUENCE})
        index.commit({"private-1": None}, {"private-2": None})
    content = path.read_bytes()
    assert b"other" in content
    assert b"private" not in content


def test_blobs_load_in_order_of_use(path: Path) -> None:
    with closing(Index(path)) as index:
        index.touch_order(["unknown"])  # of an index that has no row yet
        index.commit(dict.fromkeys("abcde", BLOB), {})
        index.commit({"b": BLOB, "c": None}, {})
        assert [key for key, _ in index.load_blobs()] == ["a", "d", "e", "b"]
        index.touch_order(["e", "unknown", "a"])
    assert list(load(path)[0]) == ["d", "b", "e", "a"]


def test_meta_is_kept_and_identity_stays(path: Path) -> None:
    with closing(Index(path)) as index:
        uuid = index.uuid
        assert len(bytes.fromhex(uuid)) == 16
        assert index.generation == 0
        assert index.get_meta("device") is None
        index.generation = 41
        index.set_meta("device", "SN é")
    with closing(Index(path)) as index:
        assert (index.uuid, index.generation) == (uuid, 41)
        assert index.get_meta("device") == "SN é"


@pytest.mark.parametrize("umask", [0, 0o777])
def test_files_are_private_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        index = Index(path)
        index.commit({"a": BLOB}, {})
    finally:
        os.umask(before)
    with closing(index):
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    names = ("", "-wal", "-shm", "-commits")
    assert modes == dict.fromkeys([f"index.sqlite{name}" for name in names], 0o600)
    assert sorted(os.listdir(path.parent)) == ["index.sqlite", "index.sqlite-commits"]


WRITER = """
import sys
from itertools import count
from spdk_kv.index import database
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
index = Index(sys.argv[1])
for n in count(int(sys.argv[2])):
    put = {f"{n}-{part}": BlobRecord(n, n, "uint8", (n,), part) for part in range(5)}
    index.commit(put | {f"{n - 3}-0": None}, {})
    print(n, flush=True)
"""


def test_kill_9_keeps_every_committed_row_and_no_part_of_another(path: Path) -> None:
    first = 0
    for lines in (1, 7, 60):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(first)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        printed = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        told = int(printed[-1]) if printed else first + lines - 1
        blobs, _ = load(path)
        last = max(int(key.split("-")[0]) for key in blobs)
        assert told <= last <= told + 1
        expected = {f"{n}-{part}" for n in range(last + 1) for part in range(5)}
        assert set(blobs) == expected - {f"{n}-0" for n in range(last - 2)}
        assert all(f"{blob.offset}-{blob.crc}" == key for key, blob in blobs.items())
        first = last + 1


def test_another_program_that_writes_is_store_locked_and_nothing_is_lost(index: Index) -> None:
    with closing(sqlite3.connect(index.path)) as rival:
        rival.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLocked, match=r"index\.sqlite"):
            index.commit({"a": BLOB}, {})
        rival.rollback()
    index.commit({"b": BLOB}, {})
    assert [key for key, _ in index.load_blobs()] == ["b"]


FULL_DISK = """
import os, sys
from itertools import count
from spdk_kv.errors import CapacityError
from spdk_kv.index import database
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
folder = sys.argv[1]
index = Index(folder + "/index.sqlite")
record = BlobRecord(0, 1, "uint8", (1,), 0)
try:
    for n in count():
        index.commit({f"{n}-{'x' * 10_000}": record}, {})
except CapacityError as error:
    print(error)
os.truncate(folder + "/ballast", 0)
index.commit({"after": record}, {})
index.close()
kept = [key.split("-")[0] for key, _ in Index(folder + "/index.sqlite").load_blobs()]
assert kept == [*map(str, range(n)), "after"], kept
print("kept", n)
"""


def test_a_full_disk_is_a_capacity_error_and_the_index_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    folder = tmp_path / "small"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs {folder}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs unprivileged mounts: unshare -rm mount -t tmpfs")
    run = (
        f"{mount} && head -c 1000000 /dev/zero >{folder}/ballast"
        f" && {sys.executable} {script} {folder}"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", run],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "is full" in done.stdout
    assert "kept" in done.stdout


def test_sqlite_says_full_and_the_commit_leaves_nothing(index: Index) -> None:
    connection = index._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(CapacityError, match=r"index\.sqlite"):
        index.commit({f"{n}{'x' * 1000}": BLOB for n in range(100)}, {"s": SEQUENCE})
    assert list(index.load_blobs()) == []
    index.commit({"small": BLOB}, {})
    assert [key for key, _ in index.load_blobs()] == ["small"]


def test_a_write_that_the_system_refuses_is_a_device_error(index: Index) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(DeviceError, match=r"index\.sqlite.*I/O error"):
            index.commit({"x" * 100_000: BLOB}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    index.commit({"small": BLOB}, {})
    assert [key for key, _ in index.load_blobs()] == ["small"]


def test_a_closed_index_refuses_and_closes_again(path: Path) -> None:
    index = Index(path)
    index.commit({"a": BLOB, "b": BLOB}, {})
    loading = index.load_blobs()
    next(loading)
    index.close()
    index.close()
    for use in (
        lambda: index.commit({}, {}),
        lambda: list(index.load_blobs()),
        lambda: next(loading),
        lambda: index.touch_order([]),
        lambda: index.generation,
    ):
        with pytest.raises(ClosedError):
            use()


FORKER = """
import os, sys
from spdk_kv.errors import ClosedError
from spdk_kv.index import database
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
index = Index(sys.argv[1])
record = BlobRecord(0, 1, "uint8", (1,), 0)
index.commit({"before": record}, {})
if os.fork() == 0:
    try:
        index.commit({"child": record}, {})
    except ClosedError:
        index.close()
        sys.exit(3)  # finalises the inherited connection too
    sys.exit(4)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
index.commit({"after": record}, {})
os.kill(os.getpid(), 9)
"""


def test_a_forked_child_is_refused_and_does_the_parent_no_harm(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKER, str(path)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert list(load(path)[0]) == ["before", "after"]


def test_a_folder_that_is_missing_is_a_device_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="missing/index"):
        Index(tmp_path / "missing" / "index.sqlite")


def test_an_index_that_cannot_be_made_durable_is_not_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Index(path).close()

    def refuse(connection: sqlite3.Connection) -> None:
        raise DeviceError("as if its filesystem could hold no log")

    with monkeypatch.context() as patched:
        patched.setattr(database, "make_durable", refuse)
        with pytest.raises(DeviceError, match="no log"):
            Index(path)
    Index(path).close()


def test_every_refusal_is_one_of_ours(path: Path) -> None:
    path.mkdir()
    with pytest.raises(SpdkKvError):
        Index(path)


def test_a_hundred_thousand_blobs_load_into_little_memory(path: Path) -> None:
    number = count()
    put = {
        f"doc-{n}/layer-{n % 32}/k": BlobRecord(n << 16, 65536, "bfloat16", (1, 8, 64, 64), n)
        for n in (next(number) for _ in range(100_000))
    }
    with closing(Index(path)) as index:
        index.commit(put, {})
    with closing(Index(path)) as index:
        tracemalloc.start()
        loaded = list(index.load_blobs())
        nbytes, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert dict(loaded) == put
    # Key 70, tuple 56, record 72, two ints 64: kinds shared, or a shape alone would add 100.
    assert nbytes < 300 * len(put)
    assert peak < 1.1 * nbytes
    assert len({id(record.shape) for _, record in loaded}) == 1
