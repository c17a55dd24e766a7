"""An fsync that failed is not forgotten: the kernel drops what it could not write, tells once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import spdk_kv
from spdk_kv.errors import DeviceError, KeyNotFound
from store.helpers import folder_fixture, noise, open_store, payload, python, reopen, version_of
from support.places import TESTS
from support.preload import preloaded

folder = folder_fixture


@contextmanager
def failing_fsync(store: spdk_kv.KVStore) -> Iterator[None]:
    """While it lasts, the data's descriptor is a pipe's, whose fdatasync fails."""
    kept = os.dup(store.engine.fd)
    ends = os.pipe()
    os.dup2(ends[0], store.engine.fd)
    try:
        yield
    finally:
        os.dup2(kept, store.engine.fd)
        for fd in (kept, *ends):
            os.close(fd)


def interrupted(store: spdk_kv.KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the caller waits for the drive's flush, which ends all the same."""

    def run(transfer, timeout_s=None):
        transfer.run()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.engine, "run", run)
        with pytest.raises(KeyboardInterrupt):
            store.flush()


@pytest.mark.parametrize("engine", ["pagecache", "threads"])
@pytest.mark.parametrize("how", ["waited for", "by a deadline", "interrupted"])
def test_after_a_failed_fsync_nothing_is_called_safe(folder, engine, how, monkeypatch):
    store = open_store(folder, engine=engine)
    store.put("before", payload("before", 1))
    store.flush()
    store.put("lost", payload("lost", 1))
    with failing_fsync(store):
        if how == "interrupted":
            interrupted(store, monkeypatch)
        else:
            with pytest.raises(DeviceError, match="flush of"):
                store.flush(30 if how == "by a deadline" else None)
    for _ in range(2):
        with pytest.raises(DeviceError, match="an earlier flush"):
            store.flush()
    with pytest.raises(DeviceError, match="an earlier flush"):
        store.put("later", payload("later", 1))
    assert version_of("lost", store.get("lost")) == 1  # as long as the store is open
    with pytest.raises(DeviceError, match="open it again"):
        store.close()
    with reopen(folder, engine=engine) as store:
        assert version_of("before", store.get("before")) == 1
        with pytest.raises(KeyNotFound):
            store.get("lost")
        store.put("later", payload("later", 1))
        store.flush()


def test_an_interrupted_flush_that_succeeds_is_no_failure(folder, monkeypatch):
    with open_store(folder, engine="pagecache") as store:
        store.put("a", noise(100))
        interrupted(store, monkeypatch)
        store.flush()
    with reopen(folder) as store:
        assert store.keys() == ["a"]


# What is not on the medium when an fsync of the index fails is taken back, as if the kernel had
# dropped it: the file is again what it was at its last successful fsync.
_DROPS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4000);
    if (n < 0) return 0;
    path[n] = 0;
    return strstr(path, "index.sqlite") != NULL;
}

static void copy(const char *from, const char *to) {
    char block[65536];
    int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT, 0600);
    ssize_t n;
    off_t size = 0;
    while (in >= 0 && (n = read(in, block, sizeof block)) > 0) {
        if (write(out, block, n) != n) abort();
        size += n;
    }
    if (out >= 0 && ftruncate(out, size)) abort();
    close(in);
    close(out);
}

static int sync_once(const char *name, int fd) {
    char path[4096], synced[4200];
    int ours = path_of(fd, path);
    snprintf(synced, sizeof synced, "%s.synced", path);
    if (ours && !strncmp(getenv("FAILING"), strstr(path, "index.sqlite") + 12, 4)
        && strlen(getenv("FAILING")) == strlen(strstr(path, "index.sqlite") + 12)
        && !unlink(getenv("FLAG"))) {
        if (!access(synced, F_OK)) copy(synced, path);
        errno = EIO;
        return -1;
    }
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    int result = real(fd);
    if (ours && !result) copy(path, synced);
    return result;
}

int fsync(int fd) { return sync_once("fsync", fd); }
int fdatasync(int fd) { return sync_once("fdatasync", fd); }
"""

_SCRIPT = """
import os, sys
sys.path[:0] = sys.argv[2:]
import numpy as np
from spdk_kv.errors import SpdkKvError
from store.helpers import open_store, payload

store = open_store(sys.argv[1], engine="pagecache", capacity="64 MiB")
flag, failures, kept = os.environ["FLAG"], 0, 0
for turn in range(30):
    if turn % 3 == 1:
        open(flag, "w").close()
    # Long keys, so that the log is copied into the file now and then.
    store.put_many({f"{turn} {i} {'x' * 2000}": payload(f"{turn} {i}", 1, 100) for i in range(60)})
    while True:
        try:
            store.flush()
            break
        except SpdkKvError:
            failures += 1
    kept = turn
print(failures, os.path.exists(flag), flush=True)
os._exit(0)  # without the checkpoint of a close
"""


@pytest.mark.parametrize("failing", ["-wal", ""])
def test_a_flush_after_a_failed_fsync_of_the_index_means_it(folder, tmp_path, failing):
    variables = {"FAILING": failing, "FLAG": str(tmp_path / "flag")}
    env = preloaded(_DROPS, tmp_path, **variables)
    ran = python(_SCRIPT, str(folder / "kv"), str(TESTS), env=env)
    assert ran.returncode == 0, ran.stderr
    failures, left = ran.stdout.split()
    # SQLite does not report that a copy of its log into the file failed: it does that again.
    assert int(failures) == (10 if failing else 0)
    assert failing == "" or left == "False"
    with reopen(folder / "kv", engine="pagecache") as store:
        assert len(store) == 30 * 60
        for key in store.keys(""):
            turn, number, _ = key.split()
            assert np.array_equal(
                store.get(key, as_numpy=True), payload(f"{turn} {number}", 1, 100)
            )
