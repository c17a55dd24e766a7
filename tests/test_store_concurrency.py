"""Many threads, forks, closes and hung devices at once: every get is still the truth."""

from __future__ import annotations

import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import blockdev
import numpy as np
import pytest
import torch
from helpers_store import (
    check_books,
    folder_fixture,
    noise,
    open_store,
    payload,
    python,
    reopen,
    version_of,
)

import spdk_kv
from spdk_kv.errors import CapacityError, ClosedError, DeviceTimeout, KeyNotFound, SpdkKvError
from spdk_kv.store_blobs import BlobReader, BlobWriter

folder = folder_fixture
HERE = str(Path(__file__).parent)


# -- threads --------------------------------------------------------------------------------------


class Shelf:
    """What a key may hold: a reader sees nothing older than what was done before it began, and
    nothing newer than what had begun by its end."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.begun = self.done = 0
        self.writing = threading.Lock()  # one writer at a time, or old and new are not known

    def write(self, store: spdk_kv.KVStore, rng: random.Random) -> None:
        with self.writing:
            version = self.begun = self.begun + 1
            if version % 5 == 0:
                store.delete(self.key)
            elif version % 7 == 0:
                put = payload(self.key, version, rng.randrange(16, 60_000))
                store.put_async(self.key, put).result(30)
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
        while time.monotonic() < until:
            shelf = rng.choice(shelves)
            if rng.random() < 0.4:
                shelf.write(store, rng)
            elif rng.random() < 0.05:
                store.flush()
            else:
                shelf.read(store, evicts)
            count += 1
        return count

    options = {"engine": None if engine == "ram" else engine, "flush_interval_s": 0.02}
    with open_store(where, capacity=capacity, **options) as store:
        with ThreadPoolExecutor(16) as threads:
            counts = list(threads.map(work, range(16)))
        assert min(counts) > 3
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
    with open_store(folder, capacity="4 MiB", verify=False) as store:
        store.put("hot", payload("hot", 0, 900_000))
        over = threading.Event()

        def read() -> int:
            count = 0
            while not over.is_set():
                version_of("hot", store.get("hot", as_numpy=True))
                count += 1
            return count

        with ThreadPoolExecutor(4) as threads:
            reads = [threads.submit(read) for _ in range(4)]
            for version in range(1, 60):
                store.put("hot", payload("hot", version, 900_000))
                if all(read.done() for read in reads):
                    break
            over.set()
            assert sum(read.result() for read in reads) > 10
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
        lambda count: store.put_async("async", noise(5000)).result(30),
        lambda count: store.get_many_async(["async"]).result(30),
        lambda count: store.flush_async().result(30),
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
            closer.join(30)
        for call in running:
            call.result(30)
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
        writer.run(None)
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
        "from helpers_store import open_store, payload\n"
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
from helpers_store import open_store, payload, version_of
from spdk_kv.errors import ClosedError

store = open_store(sys.argv[1])
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
    with open_store(folder) as store:
        store.put("k", payload("k", 1))
        answers = context.SimpleQueue()
        child = context.Process(target=_use_in_child, args=(store, answers))
        child.start()
        child.join(30)
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
        used = store.catalog.extents.allocator._used
        before = set(used)
        started = time.monotonic()
        with pytest.raises(DeviceTimeout):
            store.put("new", tensor, timeout_s=0.3)
        assert time.monotonic() - started < 5
        assert "new" not in store
        (held,) = set(used) - before  # where the device may still write
        with pytest.raises(DeviceTimeout):
            store.put_async("new", tensor, timeout_s=0.3).result(20)
        with pytest.raises(CapacityError):
            store.put("third", payload("third", 1, 3 << 20), timeout_s=0.3)
        assert held in used
        device.thaw()
        deadline = time.monotonic() + 20
        while True:
            try:
                store.put("third", payload("third", 1, 3 << 20), timeout_s=10)
                break
            except CapacityError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert version_of("third", store.get("third")) == 1
        assert version_of("old", store.get("old")) == 1
        store.flush()
        check_books(store)


# -- Ctrl-C ---------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at the n-th place in the store's own code where Ctrl-C may.

    The interpreter looks for signals where a function begins and where a call of C has returned;
    a profiler is called at the same places.
    """

    def __init__(self, at: int) -> None:
        self.left = at

    def _profile(self, frame, event, _):
        if event in ("call", "c_return") and "/spdk_kv/" in frame.f_code.co_filename:
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def run(self, call) -> bool:
        """Whether it came to the interrupt."""
        sys.setprofile(self._profile)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return self.left <= 0  # it came where exceptions are swallowed: in a finalizer


def interrupted_everywhere(prepare, call, check, step: int = 1) -> int:
    """Runs ``call`` again and again, interrupted a little later each time, until it is not."""
    at = random.randrange(step)
    while True:
        at += step
        prepare(at)
        if not Interrupt(at).run(lambda at=at: call(at)):
            return at
        check(at)


def still_true(store: spdk_kv.KVStore, at: int) -> None:
    """No extent is in two hands, the books are right, and every key has a value that was put."""
    catalog = store.catalog
    catalog.extents.allocator.check()
    named = [record.offset for record in catalog.blobs.values() if record.nbytes]
    assert len(named) == len(set(named))
    assert set(named) <= set(catalog.extents.allocator._used)
    for key in store.keys(""):
        assert version_of(key, store.get(key)) <= at


@pytest.fixture
def long_lived(folder) -> Iterator[list[spdk_kv.KVStore]]:
    """One store, in a list so that a test may reopen it. What an interrupt loses of the space
    comes back by that."""
    stores = [open_store(folder, engine="pagecache", capacity="1 MiB")]
    yield stores
    stores[0].close()
    with reopen(folder) as store:  # an extent in two records would be refused here
        still_true(store, 1 << 30)


def again(stores: list[spdk_kv.KVStore], folder: Path) -> None:
    stores[0].close()
    stores[0] = reopen(folder, engine="pagecache")


@pytest.mark.slow
def test_ctrl_c_anywhere_in_a_put(folder, long_lived):
    def put(at: int) -> None:
        long_lived[0].put_many({key: payload(key, at, 60_000) for key in "abc"})

    def one_version() -> bool:
        there = [key for key in "abc" if key in long_lived[0]]
        found = {version_of(key, long_lived[0].get(key)) for key in there}
        return len(there) in (0, 3) and len(found) <= 1

    def check(at: int) -> None:
        still_true(long_lived[0], at)
        assert one_version()  # all visible together, or none
        # New extents must never be those that an older record on the medium still names.
        long_lived[0].put("d", payload("d", at, 100_000))
        long_lived[0].flush()
        still_true(long_lived[0], at)
        if at % 4 == 0:
            again(long_lived, folder)
            still_true(long_lived[0], at)
            assert one_version()

    assert interrupted_everywhere(lambda at: None, put, check) > 50


@pytest.mark.slow
def test_ctrl_c_anywhere_in_an_eviction_a_flush_or_a_delete(folder, long_lived):
    def prepare(at: int) -> None:
        again(long_lived, folder)
        for key in "abcdefgh":
            long_lived[0].put(key, payload(key, at, 110_000))

    def change(at: int) -> None:
        long_lived[0].delete("c")
        long_lived[0].put("full", payload("full", at, 300_000))  # evicts, and so commits
        long_lived[0].flush()

    def check(at: int) -> None:
        still_true(long_lived[0], at)
        again(long_lived, folder)
        still_true(long_lived[0], at)

    assert interrupted_everywhere(prepare, change, check, 7) > 150


@pytest.mark.slow
def test_ctrl_c_anywhere_in_a_get(folder, long_lived):
    store = long_lived[0]
    store.put_many({key: payload(key, 0, 60_000) for key in "ab"})
    outs = [np.empty(60_000, np.uint8) for _ in range(2)]
    held = store.catalog.find(["a", "b"])  # another reader's pins

    def get(at: int) -> None:
        store.get_many(["a", "b", "a"])
        store.get("a", out=outs[0])
        store.get_async("b", out=outs[1]).result(10)

    def check(at: int) -> None:
        still_true(store, at)
        store.put("c", payload("c", at, 100))  # ends what has come to its end by now
        # Never fewer pins than readers: that would let an extent be reused under one.
        assert all(store.catalog.extents.pinned(record.offset) for record in held)

    assert interrupted_everywhere(lambda at: None, get, check) > 100
    store.catalog.unpin(held)


def test_ctrl_c_just_after_the_start_of_a_future(folder, long_lived):
    # Whoever called gives up, and the transfer comes to its end all the same.
    store = long_lived[0]
    store.put("a", payload("a", 0, 60_000))
    (held,) = store.catalog.find(["a"])
    reader = BlobReader(store, ("a",), None, None, True)
    future = reader.start(None, lambda found: found[0])
    reader._failed(KeyboardInterrupt())
    assert version_of("a", future.result(10)) == 0
    store.flush()
    assert store.catalog.extents.pinned(held.offset)
    store.catalog.unpin([held])
    for _ in range(20):
        writer = BlobWriter(store, {"a": payload("a", 1, 60_000)})
        future = writer.start(None)
        writer._give_up()
        future.result(10)
        store.put("b", payload("b", 1, 60_000))
        still_true(store, 1)
    check_books(store)


@pytest.mark.slow
def test_ctrl_c_anywhere_in_a_sequence(folder, long_lived):
    shape = spdk_kv.KVShape(1, 2, 64, torch.float16, 400)
    k = torch.arange(400).repeat_interleave(128).view(1, 400, 2, 64).transpose(1, 2).half()

    def prepare(at: int) -> None:
        again(long_lived, folder)
        if "s" in long_lived[0].sequences():
            long_lived[0].sequence("s").delete()
        sequence = long_lived[0].sequence("s", shape)
        sequence.append(0, k[:, :, :100], k[:, :, :100])
        long_lived[0].flush()

    def change(at: int) -> None:
        sequence = long_lived[0].sequence("s")
        sequence.append(0, k[:, :, 100:101], k[:, :, 100:101])
        sequence.append(0, k[:, :, 101:200], k[:, :, 101:200])
        sequence.read(0)
        sequence.truncate(70)
        sequence.append(0, k[:, :, 70:90], k[:, :, 70:90])
        long_lived[0].flush()

    def look(sequence: spdk_kv.Sequence) -> None:
        try:
            found = sequence.read(0)
        except SpdkKvError:
            return  # interrupted half way, and says so
        count = sequence.tokens(0)
        assert all(torch.equal(tensor, k[:, :, :count]) for tensor in found)

    def check(at: int) -> None:
        if "s" in long_lived[0].sequences():
            look(long_lived[0].sequence("s"))
        with suppress(SpdkKvError):
            long_lived[0].close()
        long_lived[0] = reopen(folder, engine="pagecache")
        sequence = long_lived[0].sequence("s")
        assert sequence.tokens(0) >= 70
        assert torch.equal(sequence.read(0)[0], k[:, :, : sequence.tokens(0)])

    assert interrupted_everywhere(prepare, change, check, 7) > 200


_SIGINT = """
import os, random, signal, sys, threading, time
sys.path[:0] = sys.argv[2:3]
import torch
import spdk_kv
from helpers_store import open_store, payload, version_of
from spdk_kv.errors import KeyNotFound, SpdkKvError

left = 0  # interrupts that are still wanted: two may come in one call

def handler(number, frame):
    global left, interrupts
    if left:
        left -= 1
        interrupts += 1
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, handler)
store = open_store(sys.argv[1], capacity="2 MiB", engine=sys.argv[3], flush_interval_s=0.05)
begun, rng, interrupts = {}, random.Random(0), 0
over = threading.Event()

def interrupt():
    while not over.wait(random.random() * 0.006):
        os.kill(os.getpid(), signal.SIGINT)

def use():
    key = f"key {rng.randrange(10)}"
    if rng.random() < 0.5:
        begun[key] = begun.get(key, 0) + 1
        store.put(key, payload(key, begun[key], rng.randrange(16, 200_000)))
    elif rng.random() < 0.1:
        store.flush()
    elif rng.random() < 0.1:
        store.put_async(key, payload(key, begun.setdefault(key, 0), 100_000)).result(30)
    else:
        try:
            assert version_of(key, store.get(key)) <= begun.get(key, 0)
        except KeyNotFound:
            pass

timer = threading.Thread(target=interrupt)
timer.start()
deadline = time.monotonic() + 3
while time.monotonic() < deadline:
    try:
        try:
            left = rng.choice([1, 1, 2])
            use()
            left = 0
        except KeyboardInterrupt:
            left = 0
    except KeyboardInterrupt:
        pass
over.set()
timer.join()
store.catalog.extents.allocator.check()
store.close()
with open_store(sys.argv[1], capacity=None) as store:
    for key in store.keys():
        assert version_of(key, store.get(key)) <= begun[key]
print(interrupts)
"""


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_sigint_at_random_moments_is_a_keyboard_interrupt_and_harms_nothing(folder, engine):
    ran = python(_SIGINT, str(folder), HERE, engine)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[0]) > 50
