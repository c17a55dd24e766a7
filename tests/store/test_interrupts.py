"""Ctrl-C anywhere: the store stays true, and what it loses at most is some free space."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import spdk_kv
from spdk_kv.errors import SpdkKvError
from spdk_kv.store.blobs import BlobReader, BlobWriter
from store.helpers import (
    check_books,
    folder_fixture,
    open_store,
    payload,
    python,
    reopen,
    version_of,
)
from support.interrupts import Interrupt, interrupted_everywhere
from support.places import TESTS
from support.rounds import rounds
from support.waiting import PATIENCE_S

folder = folder_fixture
HERE = str(TESTS)


def still_true(store: spdk_kv.KVStore, at: int) -> None:
    """No extent is in two hands, the books are right, and every key has a value that was put."""
    catalog = store.catalog
    catalog.records.extents.allocator.check()
    named = [record.offset for record in catalog.records.blobs.values() if record.nbytes]
    assert len(named) == len(set(named))
    assert set(named) <= set(catalog.records.extents.allocator._used)
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


@pytest.mark.long
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


@pytest.mark.long
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

    assert interrupted_everywhere(prepare, change, check, rounds(7, 1)) > 150


@pytest.mark.long
def test_ctrl_c_anywhere_in_a_get(folder, long_lived):
    store = long_lived[0]
    store.put_many({key: payload(key, 0, 60_000) for key in "ab"})
    outs = [np.empty(60_000, np.uint8) for _ in range(2)]
    held = store.catalog.records.find(["a", "b"])  # another reader's pins

    def get(at: int) -> None:
        store.get_many(["a", "b", "a"])
        store.get("a", out=outs[0])
        store.get_async("b", out=outs[1]).result(PATIENCE_S)

    def check(at: int) -> None:
        still_true(store, at)
        store.put("c", payload("c", at, 100))  # ends what has come to its end by now
        # Never fewer pins than readers: that would let an extent be reused under one.
        assert all(store.catalog.records.extents.is_pinned(record.offset) for record in held)

    assert interrupted_everywhere(lambda at: None, get, check) > 100
    store.catalog.records.unpin(held)


def test_ctrl_c_just_after_the_start_of_a_future(folder, long_lived):
    # Whoever called gives up, and the transfer comes to its end all the same.
    store = long_lived[0]
    store.put("a", payload("a", 0, 60_000))
    (held,) = store.catalog.records.find(["a"])
    reader = BlobReader(store, ("a",), None, None, True)
    future = reader.start(None, lambda found: found[0])
    reader._failed(KeyboardInterrupt())
    assert version_of("a", future.result(PATIENCE_S)) == 0
    store.flush()
    assert store.catalog.records.extents.is_pinned(held.offset)
    store.catalog.records.unpin([held])
    for _ in range(20):
        writer = BlobWriter(store, {"a": payload("a", 1, 60_000)})
        future = writer.start()
        writer._give_up()
        future.result(PATIENCE_S)
        store.put("b", payload("b", 1, 60_000))
        still_true(store, 1)
    check_books(store)


def test_a_put_that_was_given_up_is_not_visible_when_it_ends(long_lived, monkeypatch):
    store, goes_on = long_lived[0], threading.Event()
    writer = BlobWriter(store, {"a": payload("a", 1, 60_000)})
    finish = writer._finish

    def held(transfer) -> None:
        assert goes_on.wait(PATIENCE_S)
        finish(transfer)

    monkeypatch.setattr(writer, "_finish", held)
    future = writer.start()
    writer._give_up()
    goes_on.set()
    future.result(PATIENCE_S)
    assert "a" not in store
    check_books(store)


def test_ctrl_c_as_a_mapped_blob_goes_leaves_it_unpinned(folder):
    with open_store(folder, engine="pagecache", mmap=True) as store:
        store.put("a", payload("a", 0))
        (record,) = store.catalog.records.find(["a"])
        store.catalog.records.unpin([record])
        for at in range(1, 5):
            found = [store.get("a")]
            assert store.catalog.records.extents.is_pinned(record.offset)
            Interrupt(at).run(found.clear)
            store.catalog.quarantine.settle()
            assert not store.catalog.records.extents.is_pinned(record.offset)


@pytest.mark.long
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
        found, count = sequence.read(0), sequence.tokens(0)
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

    assert interrupted_everywhere(prepare, change, check, rounds(7, 1)) > 200


_SIGINT = """
import os, random, signal, sys, threading, time
sys.path[:0] = sys.argv[2:3]
import torch
import spdk_kv
from store.helpers import open_store, payload, version_of
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
begun, rng, interrupts, wanted = {}, random.Random(0), 0, int(sys.argv[4])
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
        store.put_async(key, payload(key, begun.setdefault(key, 0), 100_000)).result(100)
    else:
        try:
            assert version_of(key, store.get(key)) <= begun.get(key, 0)
        except KeyNotFound:
            pass

timer = threading.Thread(target=interrupt)
timer.start()
deadline = time.monotonic() + 120
while interrupts <= wanted and time.monotonic() < deadline:
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
store.catalog.records.extents.allocator.check()
store.close()
with open_store(sys.argv[1], capacity=None) as store:
    for key in store.keys():
        assert version_of(key, store.get(key)) <= begun[key]
print(interrupts)
"""


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_sigint_at_random_moments_is_a_keyboard_interrupt_and_harms_nothing(folder, engine):
    wanted = rounds(15, 50)
    ran = python(_SIGINT, str(folder), HERE, engine, str(wanted))
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[0]) > wanted
