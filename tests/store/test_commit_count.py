"""The count of commits on the drive: when it is written, and what a drive that fails it does."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from spdk_kv.errors import StoreMismatch
from spdk_kv.index import Index
from spdk_kv.placement import COUNT_NBYTES, COUNT_OFFSET, parse_count
from spdk_kv.store import KVStore, parts
from spdk_kv.store.superblocks import CountWriter
from store.helpers import (
    folder_fixture,
    open_store,
    payload,
    python,
    reopen,
    version_of,
)
from store.test_old_copies import copy_index
from support.places import TESTS
from support.preload import preloaded

folder = folder_fixture

# Writes of the count wait while the file HOLD is there. They, and reads of it, fail while FAIL is.
_FAULTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(void) { return !access(getenv("FAIL"), F_OK); }

ssize_t pwrite64(int fd, const void *from, size_t nbytes, off64_t offset) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    if (offset == 262144 && nbytes == 4096) {
        while (!access(getenv("HOLD"), F_OK)) usleep(1000);
        if (fails()) { errno = EIO; return -1; }
    }
    return real(fd, from, nbytes, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *to, int count, off64_t offset, int flags) {
    ssize_t (*real)(int, const struct iovec *, int, off64_t, int)
        = dlsym(RTLD_NEXT, "preadv64v2");
    if (offset == 262144 && fails()) { errno = EIO; return -1; }
    return real(fd, to, count, offset, flags);
}
"""

_BEGIN = """
import logging, os, sys, threading, traceback
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
import torch
import spdk_kv
from spdk_kv.errors import DeviceTimeout
from spdk_kv.store import superblocks
from store.helpers import open_store, payload, reopen, version_of
from store.test_commit_count import count_on
from support.waiting import PATIENCE_S, wait_until

class Kept(logging.Handler):
    def emit(self, record):
        text.append(record.getMessage())

def fail_at_once(*failure):
    traceback.print_exception(*failure)
    os._exit(1)

sys.excepthook = fail_at_once  # without waiting for what is held
text = []
logging.getLogger("spdk_kv").addHandler(Kept())
folder = Path(sys.argv[1])
hold, fail = Path(os.environ["HOLD"]), Path(os.environ["FAIL"])
store = open_store(folder, engine="threads", capacity="1 MiB")
index = store.catalog.committer.index

def data():
    return (folder / "data").read_bytes()

def begin(call):
    thread = threading.Thread(target=call)
    thread.start()
    return thread
"""


def count_on(store: KVStore) -> int:
    """What the data file says."""
    with open(store.engine.where, "rb") as file:
        file.seek(COUNT_OFFSET)
        return parse_count(file.read(COUNT_NBYTES), store.uuid)


def run_with_faults(folder: Path, tmp_path: Path, script: str) -> None:
    names = {name: str(tmp_path / name) for name in ("HOLD", "FAIL")}
    env = preloaded(_FAULTS, tmp_path, **names)
    ran = python(_BEGIN + script, str(folder / "store"), str(TESTS), env=env)
    assert ran.returncode == 0, ran.stderr


def test_nothing_is_written_over_what_a_commit_let_go_of_before_the_drive_has_its_number(
    folder, tmp_path
):
    run_with_faults(
        folder,
        tmp_path,
        """
superblocks._COUNT_TIMEOUT_S = PATIENCE_S
store.put("a", payload("a", 1, 600_000))
store.flush()
store.catalog.settle()
before = data()
hold.touch()
store.delete("a")
store.flush()  # over, although the drive has not its number
assert count_on(store) == index.commits - 1
put = begin(lambda: store.put("b", payload("b", 1, 900_000)))
put.join(0.2)
assert put.is_alive() and data() == before
hold.unlink()
put.join()
assert count_on(store) == index.commits
assert version_of("b", store.get("b")) == 1 and data() != before
store.close()
""",
    )


def test_tokens_are_written_over_only_when_the_drive_has_the_commit_that_forgot_them(
    folder, tmp_path
):
    run_with_faults(
        folder,
        tmp_path,
        """
superblocks._COUNT_TIMEOUT_S = PATIENCE_S
sequence = store.sequence("s", spdk_kv.KVShape(1, 1, 64, torch.float32, 500))
ones = torch.ones(1, 1, 400, 64)
sequence.append(0, ones, ones)
store.flush()
store.catalog.settle()
commits = index.commits
hold.touch()
truncate = begin(lambda: sequence.truncate(100))
wait_until(lambda: index.commits > commits)
truncate.join(0.2)
assert truncate.is_alive()
hold.unlink()
truncate.join()
assert count_on(store) == index.commits
sequence.append(0, 2 * ones[:, :, :300], 2 * ones[:, :, :300])
store.flush()
assert sequence.read(0)[0][0, 0, :, 0].tolist() == [1.0] * 100 + [2.0] * 300
store.close()
""",
    )


def test_a_drive_that_hangs_on_the_count_is_waited_for_by_nobody_with_a_deadline(folder, tmp_path):
    run_with_faults(
        folder,
        tmp_path,
        """
superblocks._COUNT_TIMEOUT_S = PATIENCE_S
hold.touch()
store.put("a", payload("a", 1))
store.flush(timeout_s=PATIENCE_S)
for call in (store.put, store.put_async):
    try:
        call("b", payload("b", 1), timeout_s=0.05)
    except DeviceTimeout as late:
        assert "count of commits" in str(late)
    else:
        raise AssertionError
assert "b" not in store
hold.unlink()
store.put("b", payload("b", 2))
superblocks._COUNT_TIMEOUT_S = 0.05  # waited for once by those without one
hold.touch()
store.flush()
for number in range(10):
    store.put("c", payload("c", number))
    store.flush()
assert sum("stays behind" in line for line in text) == 1, text
seen = count_on(store)
assert seen < index.commits - 5
hold.unlink()
wait_until(lambda: not store.catalog.committer._count._last.in_flight)
store.put("c", payload("c", 11))
superblocks._COUNT_TIMEOUT_S = PATIENCE_S
store.close()
commits = index.commits
store = reopen(folder, engine="threads")
assert count_on(store) == commits
assert version_of("c", store.get("c")) == 11
store.close()
""",
    )


def test_a_drive_that_fails_the_count_keeps_the_store_and_gets_it_later(folder, tmp_path):
    run_with_faults(
        folder,
        tmp_path,
        """
fail.touch()
for number in range(5):
    store.put("a", payload("a", number))
    store.flush()
store.catalog.settle()
assert count_on(store) == 0
assert sum("stays behind" in line for line in text) == 1, text
store.close()
text.clear()
store = reopen(folder, engine="threads")  # its block cannot be read either
assert sum("cannot be read" in line for line in text) == 1, text
assert version_of("a", store.get("a")) == 4
store.put("a", payload("a", 5))
store.flush()
store.catalog.settle()
fail.unlink()
store.flush()  # changes nothing, but what failed is written
store.catalog.settle()
assert count_on(store) == store.catalog.committer.index.commits
store.close()
""",
    )


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
def test_close_leaves_the_number_of_its_last_commit(folder, engine):
    for number in range(3):
        with open_store(folder, engine=engine) as store:
            store.put("a", payload("a", number))
            index = store.catalog.committer.index
        assert count_on(store) == index.commits


def test_close_leaves_the_number_of_what_it_notes_after_the_last_commit(folder, monkeypatch):
    """The order of use, the ages of sequences, a summary and the write budget."""
    with open_store(folder / "store") as store:
        store.put("a", payload("a", 1))
        store.put("b", payload("b", 1))
    for budget in (None, "1 GiB/day"):
        store = reopen(folder / "store", write_budget=budget)
        index = store.catalog.committer.index
        if budget:
            store.put("a", payload("a", 2, 1_000_000))
        store.get("b")
        store.catalog.commit()
        commits = index.commits
        copy_index(folder / "store", folder / "copy")
        store.close()
        assert count_on(store) == index.commits > commits
        copy_index(folder / "store", folder / "newest")
        put_back(folder / "copy", folder / "store")
        with pytest.raises(StoreMismatch, match="old copy"):
            reopen(folder / "store")
        put_back(folder / "newest", folder / "store")
    with reopen(folder / "store") as store:
        assert [version_of(key, store.get(key)) for key in "ab"] == [2, 1]


class OnItsWay:
    """A write that ends when it is waited for."""

    in_flight, status = True, 0

    def wait(self, timeout_s: float | None) -> int:
        assert timeout_s == 60
        self.in_flight = False
        return 0


def test_the_write_of_a_number_waits_for_the_one_before(folder, caplog):
    with open_store(folder) as store:
        index = SimpleNamespace(uuid=store.uuid, commits=1)
        count = CountWriter(store.engine, index)
        count._last = OnItsWay()
        index.commits = 1000
        count.update(60)
        count.end()
        assert count_on(store) == 1000
        assert "stays behind" not in caplog.text


def test_a_discard_comes_after_the_number_of_its_commit(folder, tmp_path):
    run_with_faults(
        folder,
        tmp_path,
        """
superblocks._COUNT_TIMEOUT_S = PATIENCE_S
store.close()
store = open_store(folder, engine="threads", discard=True)
discards, discard = [], store.engine.discard
shrink = store.engine.shrink
store.engine.discard = lambda *extent: (discards.append(extent), discard(*extent))[1]
store.engine.shrink = lambda nbytes: (discards.append(nbytes), shrink(nbytes))[1]
index = store.catalog.committer.index
store.put("a", payload("a", 1, 1 << 20))
store.put("b", payload("b", 1, 1 << 20))
store.put("c", payload("c", 1, 1 << 20))
store.flush()
store.catalog.settle()
discards.clear()
commits = index.commits
hold.touch()
store.delete("a")
store.delete("c")
flush = begin(store.flush)
wait_until(lambda: index.commits > commits)
flush.join(0.2)
assert flush.is_alive() and not discards
hold.unlink()
flush.join()
assert count_on(store) == index.commits
assert discards == [(3 << 20), (1 << 20, 1 << 20)]
store.close()
""",
    )


def copied_amid_an_opening(place: Path, copied: Path, monkeypatch) -> KVStore:
    """Reopens the store; ``copied`` gets its index as it is when the next generation is noted, and
    neither the superblocks nor the index have it. A crash leaves one like it."""
    write = parts.write_superblock

    def copying(*arguments) -> None:
        copy_index(place, copied)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_superblock", copying)
        return reopen(place)


def put_back(copied: Path, place: Path) -> None:
    for path in place.glob("index.sqlite*"):
        path.unlink()
    copy_index(copied, place)


def commits_of(place: Path, scratch: Path) -> int:
    """How many commits the index in ``place`` has made. Reading it moves its log into the file, so
    a copy is read."""
    copy_index(place, scratch)
    index = Index(scratch / "index.sqlite")
    index.close()
    shutil.rmtree(scratch)
    return index.commits


def test_a_copy_from_amid_an_opening_is_refused_and_left_as_it_is(folder, monkeypatch):
    place, copied = folder / "store", folder / "copy"
    with open_store(place) as store:
        store.put("a", payload("a", 1, 300_000))
    store = copied_amid_an_opening(place, copied, monkeypatch)
    store.delete("a")
    store.flush()
    store.put("b", payload("b", 1, 300_000))
    store.close()
    copy_index(place, folder / "newest")
    put_back(copied, place)
    commits = commits_of(place, folder / "scratch")
    for _ in range(3):
        with pytest.raises(StoreMismatch, match="old copy"):
            reopen(place, verify=False)
    assert commits_of(place, folder / "scratch") == commits
    put_back(folder / "newest", place)
    with reopen(place) as store:
        assert version_of("b", store.get("b")) == 1
        assert "a" not in store


def test_a_copy_from_amid_an_opening_opens_where_nothing_was_changed_since(folder, monkeypatch):
    place, copied = folder / "store", folder / "copy"
    with open_store(place) as store:
        store.put("a", payload("a", 1))
    copied_amid_an_opening(place, copied, monkeypatch).close()
    put_back(copied, place)
    with reopen(place) as store:
        assert version_of("a", store.get("a")) == 1
