"""Many threads, forks, closes and hung devices at once: every get is still the truth."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import pytest
import torch

import spdk_kv
from spdk_kv.errors import CapacityError, ClosedError, DeviceTimeout, KeyNotFound
from spdk_kv.store.blobs import BlobWriter
from store.helpers import (
    check_books,
    folder_fixture,
    noise,
    open_store,
    payload,
    python,
    reopen,
    version_of,
)
from support import blockdev
from support.places import TESTS
from support.waiting import PATIENCE_S

folder = folder_fixture
HERE = str(TESTS)


# -- threads --------------------------------------------------------------------------------------


class Shelf:
    """What a key may hold: a reader sees nothing older than what was done before it began, and
    nothing newer than what had begun by its end."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.begun = self.done = 0
        self.writing = threading.Lock()  # one writer at a time, or old and new are not known

    def write(self, store: spdk_kv.KVStore, rng: random.Random, full: bool) -> None:
        """``full``: all writers at once may want more room than there is."""
        with self.writing, suppress(CapacityError) if full else nullcontext():
            version = self.begun = self.begun + 1
            if version % 5 == 0:
                store.delete(self.key)
            elif version % 7 == 0:
                put = payload(self.key, version, rng.randrange(16, 60_000))
                store.put_async(self.key, put).result(PATIENCE_S)
            else:
                store.put(self.key, payload(self.key, version, rng.randrange(16, 60_000)))
            self.done = version

    def read(self, store: spdk_kv.KVStore, evicts: bool) -> None:
        oldest = self.done
        try:
            version = version_of(self.key, store.get(self.key, as_numpy=True))
        except KeyNotFound:
            newest = self.begun
            gone = oldest == 0 or any(v % 5 == 0 for v in range(oldest, newest + 1))
            assert gone or evicts, f"{self.key}: version {oldest} is lost"
        else:
            assert oldest <= version <= self.begun
            assert version % 5


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache", "ram"])
@pytest.mark.parametrize("capacity", ["16 MiB", "640 KiB"])
def test_16_threads_put_get_and_delete_the_same_keys(folder, engine, capacity):
    where = "ram://" if engine == "ram" else folder
    evicts = capacity != "16 MiB"
    shelves = [Shelf(f"key {i}") for i in range(12)]
    until = time.monotonic() + 0.8

    def work(seed: int) -> int:
        rng, count = random.Random(seed), 0
        while time.monotonic() < until or count < 4:
            shelf = rng.choice(shelves)
            if rng.random() < 0.4:
                shelf.write(store, rng, evicts)
            elif rng.random() < 0.05:
                store.flush()
            else:
                shelf.read(store, evicts)
            count += 1
        return count

    options = {"engine": None if engine == "ram" else engine, "flush_interval_s": 0.02}
    with open_store(where, capacity=capacity, **options) as store:
        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(work, range(16)))
        check_books(store)
        assert store.stats()["corruptions"] == 0
        there = {shelf.key: shelf.done for shelf in shelves if shelf.key in store}
    if engine != "ram":
        with reopen(folder) as store:
            assert set(store.keys()) == set(there)
            for key, version in there.items():
                assert version_of(key, store.get(key)) == version


def test_readers_of_what_is_overwritten_get_one_version_whole(folder):
    # Writers that fill the store make every freed extent be reused at once.
    # Room for the versions that four readers hold, the one there is, and the next.
    with open_store(folder, capacity="6 MiB", verify=False) as store:
        store.put("hot", payload("hot", 0, 900_000))
        over = threading.Event()

        def read() -> int:
            count = 0
            while count < 3 or not over.is_set():
                version_of("hot", store.get("hot", as_numpy=True))
                count += 1
            return count

        with ThreadPoolExecutor(4) as threads:
            reads = [threads.submit(read) for _ in range(4)]
            try:
                for version in range(1, 60):
                    store.put("hot", payload("hot", version, 900_000))
                    if all(read.done() for read in reads):
                        break
            finally:
                over.set()
            assert all(read.result() for read in reads)
        check_books(store)


# -- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1])
def test_closing_amid_use_ends_every_call_with_success_or_closed_error(folder, engine, delay_s):
    shape = spdk_kv.KVShape(2, 2, 64, torch.float16, 4096)
    store = open_store(folder, engine=engine, flush_interval_s=0.01)
    sequence = store.sequence("s", shape)
    kv = torch.zeros(1, 2, 4, 64, dtype=torch.float16)
    store.put("async", noise(5000))
    kept: dict[str, int] = {}
    begun = threading.Barrier(7)

    def run(call) -> int:
        begun.wait()
        for count in range(10_000_000):
            try:
                call(count)
            except ClosedError:
                return count
        raise AssertionError("never closed")

    def put(count: int) -> None:
        store.put(f"k{count % 20}", payload(f"k{count % 20}", count, 30_000))
        kept[f"k{count % 20}"] = count

    def get(count: int) -> None:
        with suppress(KeyNotFound):
            version_of(f"k{count % 20}", store.get(f"k{count % 20}"))

    def append(count: int) -> None:
        if sequence.tokens(0) > 4000:
            sequence.truncate(0)
        sequence.append(0, kv, kv)
        sequence.read(0)

    calls = [
        put,
        get,
        append,
        lambda count: store.put_async("async", noise(5000)).result(PATIENCE_S),
        lambda count: store.get_many_async(["async"]).result(PATIENCE_S),
        lambda count: store.flush_async().result(PATIENCE_S),
    ]
    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(run, call) for call in calls]
        begun.wait()
        time.sleep(delay_s)
        before = dict(kept)
        closers = [threading.Thread(target=store.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(PATIENCE_S)
        for call in running:
            call.result(PATIENCE_S)
    with reopen(folder) as store:
        # Whatever was put before the close began is there, in that version or a later one.
        for key, version in before.items():
            assert version_of(key, store.get(key)) >= version
        if "s" in store.sequences():
            sequence = store.sequence("s")
            assert not sequence.read(0)[0].any()
        check_books(store)


def test_everything_raises_after_close_and_close_may_be_repeated(folder):
    store = open_store(folder)
    store.put("k", noise(10))
    sequence = store.sequence("s", spdk_kv.KVShape(1, 1, 8, torch.float16, 16))
    kv = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    store.close()
    store.close()
    calls = [
        lambda: store.put("k", noise(10)),
        lambda: store.put_many({}),
        lambda: store.put_async("k", noise(10)),
        lambda: store.get("k"),
        lambda: store.get_many([]),
        lambda: store.get_async("k"),
        lambda: store.delete("k"),
        lambda: store.contains("k"),
        lambda: "k" in store,
        store.keys,
        store.flush,
        store.flush_async,
        store.stats,
        store.sequences,
        lambda: store.sequence("s"),
        store.__enter__,
        lambda: sequence.append(0, kv, kv),
        lambda: sequence.read(0),
        lambda: sequence.prefetch([0]),
        lambda: sequence.truncate(0),
        lambda: sequence.reorder([0]),
        lambda: sequence.read_async(0),
        lambda: sequence.append_async(0, kv, kv),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    assert "closed" in repr(store)


def test_a_write_that_ends_after_the_last_commit_is_no_put(folder):
    store = open_store(folder)
    writer = BlobWriter(store, {"late": payload("late", 1)})
    store.catalog.close()
    with pytest.raises(ClosedError):
        writer.run()
    assert store.stats()["used_nbytes"] == 0
    store.close()
    with reopen(folder) as store:
        assert "late" not in store


def test_a_forgotten_store_is_closed_and_complained_about(folder):
    store = open_store(folder)
    store.put("k", payload("k", 1))
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
    with reopen(folder) as store:
        assert version_of("k", store.get("k")) == 1


def test_a_store_still_open_at_exit_is_closed(folder):
    ran = python(
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from store.helpers import open_store, payload\n"
        "store = open_store(sys.argv[1])\n"
        "store.put('k', payload('k', 1))\n",
        str(folder),
        HERE,
    )
    assert ran.returncode == 0, ran.stderr
    with reopen(folder) as store:
        assert version_of("k", store.get("k")) == 1


# -- fork -----------------------------------------------------------------------------------------

_FORK = """
import os, sys
sys.path[:0] = sys.argv[2:]
import torch
import spdk_kv
from store.helpers import open_store, payload, version_of
from spdk_kv.errors import ClosedError

# Pinned pages are copied at a fork, and of huge ones there may be none left.
store = open_store(sys.argv[1], hugepages=False)
sequence = store.sequence("s", spdk_kv.KVShape(1, 1, 8, torch.float16, 16))
kv = torch.ones(1, 1, 1, 8, dtype=torch.float16)
sequence.append(0, kv, kv)
store.put("k", payload("k", 1))
held = store.get("k")
pid = os.fork()
if not pid:
    for call in (
        lambda: store.put("k", payload("k", 2)), lambda: store.get("k"), store.keys, store.flush,
        lambda: store.sequence("s"), lambda: sequence.append(0, kv, kv), lambda: sequence.read(0),
        lambda: store.put_async("k", payload("k", 2)),
    ):
        try:
            call()
        except ClosedError as closed:
            assert "fork" in str(closed), closed
        else:
            raise AssertionError("no error in the child")
    assert version_of("k", held) == 1  # what was got is memory like any other
    store.close()
    del sequence, held
    sys.exit(42)  # with all that an interpreter does at its end
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
for version in range(2, 50):
    store.put("k", payload("k", version))
    assert version_of("k", store.get("k")) == version
    store.flush()
sequence.append(0, kv, kv)
assert sequence.read(0)[0].shape[2] == 2
store.close()
with open_store(sys.argv[1]) as store:
    assert version_of("k", store.get("k")) == 49
    assert store.sequence("s").tokens(0) == 2
print("fine")
"""


def test_a_forked_child_is_refused_and_its_end_harms_nobody(folder):
    ran = python(_FORK, str(folder), HERE)
    assert ran.stdout == "fine\n", ran.stderr


def _use_in_child(store: spdk_kv.KVStore, answers) -> None:
    try:
        store.get("k")
    except ClosedError:
        answers.put("closed")


def test_multiprocessing_with_fork(folder):
    context = multiprocessing.get_context("fork")
    with open_store(folder, hugepages=False) as store:
        store.put("k", payload("k", 1))
        answers = context.SimpleQueue()
        child = context.Process(target=_use_in_child, args=(store, answers))
        child.start()
        child.join(PATIENCE_S)
        assert answers.get() == "closed"
        assert version_of("k", store.get("k")) == 1


# -- a device that hangs --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_put_that_times_out_keeps_its_extent_until_the_device_lets_go(tmp_path, engine):
    with (
        blockdev.hung_device(tmp_path, 16 << 20) as device,
        open_store(
            f"block://{device.node}",
            create=True,
            index_dir=tmp_path / "index",
            capacity="4 MiB",
            engine=engine,
            eviction="none",
        ) as store,
    ):
        store.put("old", payload("old", 1, 1 << 20))
        device.freeze()
        # Far more than one command, so that it certainly cannot end while the device hangs.
        tensor = payload("new", 1, 1 << 20)
        used = store.catalog.records.extents.allocator._used
        before = set(used)
        with pytest.raises(DeviceTimeout):
            store.put("new", tensor, timeout_s=0.3)
        assert device.is_frozen
        assert "new" not in store
        (held,) = set(used) - before  # where the device may still write
        with pytest.raises(DeviceTimeout):
            store.put_async("new", tensor, timeout_s=0.3).result(PATIENCE_S)
        with pytest.raises(CapacityError):
            store.put("third", payload("third", 1, 3 << 20), timeout_s=0.3)
        assert held in used
        assert device.is_frozen
        device.thaw()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                store.put("third", payload("third", 1, 3 << 20), timeout_s=PATIENCE_S)
                break
            except CapacityError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert version_of("third", store.get("third")) == 1
        assert version_of("old", store.get("old")) == 1
        store.flush()
        check_books(store)
