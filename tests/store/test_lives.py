"""A name belongs to one sequence at a time, whatever threads create, delete and ask for at once."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch

import spdk_kv
from sequence.helpers import begun, shape_of
from spdk_kv.errors import CapacityError, ClosedError, KeyNotFound
from spdk_kv.store import KVStore
from store.helpers import check_books, folder_fixture, open_store, payload, reopen, version_of
from support.interrupts import interrupted_everywhere
from support.rounds import rounds
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture


@contextmanager
def being_deleted(sequence: spdk_kv.Sequence) -> Iterator[None]:
    """Another thread is in the sequence's delete(), which waits for a read until the end."""
    with ThreadPoolExecutor(1) as threads:
        with sequence._layers[1].lock:
            deleting = threads.submit(sequence.delete)
            wait_until(lambda: sequence.deleted and "s" not in sequence._host.sequences())
            assert not deleting.done()
            yield
        deleting.result(PATIENCE_S)


# -- one after another ----------------------------------------------------------------------------


def test_a_sequence_outlives_the_unfinished_delete_of_the_one_before(folder):
    with open_store(folder, capacity="64 MiB") as store:
        old, _ = begun(store, "layer", [300])
        store.flush()
        with being_deleted(old):
            new, reference = begun(store, "head", [200])
            assert new is not old
            store.flush()
        assert store.sequence("s") is new
        reference.check(new)
        check_books(store)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
        check_books(store)


def test_a_sequence_is_not_restored_while_it_is_deleted(folder):
    with open_store(folder, capacity="64 MiB") as store:
        old, _ = begun(store, "layer", [300])
        store.flush()
        with being_deleted(old):
            with pytest.raises(KeyNotFound):
                store.sequence("s")
            assert store.sequences() == []
            assert store.stats()["sequences"] == 0
            store.flush()
            # Its extents are nobody else's before the read is over.
            assert (
                store.stats()["used_nbytes"]
                == sum(old._host.catalog.records.extents.allocator._used.values())
                > 0
            )
        check_books(store)
        assert store.stats()["used_nbytes"] == 0
    with reopen(folder) as store:
        assert store.sequences() == []


def test_deleting_twice_at_once_frees_once(folder):
    with open_store(folder, capacity="64 MiB") as store:
        old, _ = begun(store, "layer", [300])
        with being_deleted(old), ThreadPoolExecutor(4) as threads:
            others = [threads.submit(old.delete) for _ in range(4)]
            old._layers[1].lock.release()
            try:
                for other in others:
                    other.result(PATIENCE_S)
            finally:
                old._layers[1].lock.acquire()
        old.delete()
        begun(store, "layer", [10])
        check_books(store)


def test_an_interrupted_delete_is_finished_by_the_next(folder):
    store = open_store(folder, capacity="64 MiB")
    made: list[spdk_kv.Sequence] = []

    def prepare(at: int) -> None:
        made[:] = [begun(store, "layer", [100])[0]]
        store.flush()

    def check(at: int) -> None:
        # Either it was not touched, or nobody gets it any more.
        with suppress(KeyNotFound):
            assert store.sequence("s") is made[0]
            assert not made[0].deleted
        made[0].delete()
        assert store.sequences() == []
        store.flush()
        store.catalog.records.extents.allocator.check()

    with store:
        assert (
            interrupted_everywhere(prepare, lambda at: made[0].delete(), check, rounds(3, 1)) > 20
        )
    with reopen(folder) as store:
        assert store.sequences() == []
        assert store.stats()["used_nbytes"] == 0


def test_deleting_after_close_is_refused_where_it_would_not_last(folder):
    store = open_store(folder, capacity="64 MiB")
    lasting, reference = begun(store, "layer", [100])
    temporary = store.sequence("t", shape_of(), temporary=True)
    store.close()
    with pytest.raises(ClosedError):
        lasting.delete()
    temporary.delete()  # it is gone already
    with reopen(folder) as store:
        assert store.sequences() == ["s"]
        reference.check(store.sequence("s"))


def test_what_is_deleted_amid_the_last_commit_is_refused_or_gone(folder):
    store = open_store(folder)
    store.put("k", payload("k", 1))
    store.catalog.close()
    with pytest.raises(ClosedError):
        store.delete("k")
    store.close()
    with reopen(folder) as store:
        assert version_of("k", store.get("k")) == 1


# -- while one is made ----------------------------------------------------------------------------


def test_making_one_keeps_nobody_waiting_but_who_asks_for_it(folder):
    with open_store(folder, capacity="64 MiB") as store, ThreadPoolExecutor(4) as threads:
        other, _ = begun(store, "layer", [10])
        with store.catalog.room._growth_lock:  # as a filesystem that takes its time
            making = [threads.submit(store.sequence, "new", shape_of()) for _ in range(3)]
            wait_until(lambda: len(store._sequences._bound) == 2)
            assert store.sequence("s") is other
            assert store.sequences() == ["s"]
            assert store.stats()["sequences"] == 1
            store.flush()
            assert not any(made.done() for made in making)
        assert len({made.result(PATIENCE_S) for made in making}) == 1
        assert store.sequences() == ["new", "s"]
        check_books(store)


def test_one_that_could_not_be_made_leaves_the_name_free(folder):
    with open_store(folder, capacity="4 MiB") as store:
        with pytest.raises(CapacityError):
            store.sequence("s", shape_of(max_tokens=60_000))
        with pytest.raises(KeyNotFound):
            store.sequence("s")
        assert not store._sequences._bound
        begun(store, "layer", [10])
        check_books(store)


# -- all at once ----------------------------------------------------------------------------------

SHAPE = spdk_kv.KVShape(2, 1, 256, torch.float32, 200)
NAMES = ["a", "b", "c"]
# Lives are told apart by their tokens: life n holds n * 256, n * 256 + 1, ...
STEP = 256


class Life:
    """What a sequence object should hold. Appends take turns; reads do not."""

    def __init__(self, number: int, tokens: list[int]) -> None:
        self.number = number
        self.tokens = tokens
        self.turn = threading.Lock()


class Lives:
    """The life of every sequence object that a store gave out, and of every record."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[spdk_kv.Sequence, Life] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._last = 0

    def of(self, sequence: spdk_kv.Sequence) -> Life:
        with self._lock:
            life = self._of.get(sequence)
            if life is None:
                held = [sequence.tokens(layer) for layer in range(2)]
                if any(held):  # restored: its tokens say whose it is
                    k, _ = sequence.read(held.index(max(held)))
                    number = int(k[0, 0, 0, 0]) // STEP
                else:
                    self._last += 1
                    number = self._last
                self._last = max(self._last, number)
                life = self._of[sequence] = Life(number, held)
            return life


def check_bytes(sequence: spdk_kv.Sequence, life: Life, layer: int) -> None:
    before = life.tokens[layer]
    k, v = sequence.read(layer)
    count = k.shape[2]
    assert count >= before
    wanted = torch.arange(count, dtype=torch.float32) + life.number * STEP
    assert torch.equal(k, wanted[None, None, :, None].expand_as(k)), "tokens of another life"
    assert torch.equal(v, -k)


def append(sequence: spdk_kv.Sequence, life: Life, layer: int, count: int) -> None:
    with life.turn:
        first = life.tokens[layer]
        if first + count > SHAPE.max_tokens:
            return
        values = torch.arange(first, first + count, dtype=torch.float32) + life.number * STEP
        k = values[None, None, :, None].expand(1, 1, count, 256)
        sequence.append(layer, k, -k)
        life.tokens[layer] = first + count


def live(store: KVStore, lives: Lives, rng: random.Random) -> None:
    """One step of one thread."""
    name, layer, choice = rng.choice(NAMES), rng.randrange(2), rng.random()
    if choice < 0.2:
        key = f"blob {rng.randrange(8)}"
        store.put(key, payload(key, rng.randrange(1000), rng.randrange(16, 200_000)))
        with suppress(KeyNotFound):
            version_of(key, store.get(key, as_numpy=True))
    elif choice < 0.25:
        store.flush()
    elif choice < 0.4:
        store.sequence(name).delete()
    else:
        sequence = store.sequence(name, SHAPE)
        life = lives.of(sequence)
        append(sequence, life, layer, rng.randrange(1, 60))
        for _ in range(rng.randrange(3)):
            check_bytes(sequence, life, layer)


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
@pytest.mark.parametrize("verify", [True, False])
def test_threads_that_create_restore_delete_flush_evict_and_close(folder, engine, verify):
    """With verify=False nothing but the tokens themselves would show whose bytes they are."""

    def work(store: KVStore, lives: Lives, seed: int, until: float) -> int:
        rng, count = random.Random(seed), 0
        while time.monotonic() < until or count < 5:
            count += 1
            try:
                live(store, lives, rng)
            except (KeyNotFound, CapacityError):
                pass
            except ClosedError as closed:
                if "the store" in str(closed) or "engine" in str(closed):
                    return count
        return count

    # Three sequences of 800 KiB, and blobs in what is left: everything is evicted and used again.
    options = {"engine": engine, "verify": verify, "flush_interval_s": 0.01}
    open_store(folder, capacity="3 MiB", **options).close()
    for epoch in range(rounds(3, 30)):
        store, lives = reopen(folder, **options), Lives()
        with ThreadPoolExecutor(6) as threads:
            until = time.monotonic() + 0.3
            running = [
                threads.submit(work, store, lives, 10 * epoch + seed, until) for seed in range(6)
            ]
            if epoch % 2:
                wait_until(lambda running=running: any(run.done() for run in running))
                store.close()
            assert all(run.result(PATIENCE_S) for run in running)
        if not epoch % 2:
            check_books(store)
        store.close()
        with reopen(folder, verify=True) as store:
            assert store.stats()["corruptions"] == 0
            for name in store.sequences():
                sequence = store.sequence(name)
                life = Lives().of(sequence)
                for layer in range(2):
                    check_bytes(sequence, life, layer)
            check_books(store)
