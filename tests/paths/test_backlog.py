"""Pending writes of all sequences: their memory comes back by itself, and there is a limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from link.helpers import Linked, linked_store
from sequence.helpers import Reference, begun, shape_of
from spdk_kv.errors import DeviceError, DeviceTimeout
from spdk_kv.paths.backlog import Backlog
from spdk_kv.store import KVStore
from store.helpers import folder_fixture, open_store
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture


@pytest.fixture
def store() -> Iterator[KVStore]:
    with open_store("ram://", capacity="64 MiB") as opened:
        opened.paths.backlog._sweep_interval_s = 1e6  # only when a test says so
        yield opened


@pytest.fixture
def linked(folder: Path) -> Iterator[Linked]:
    with linked_store(folder, "cpu", engine="uring") as found:
        yield found


def leased(store: KVStore) -> int:
    return store.stats()["staging"]["leased_nbytes"]


def is_over(sequence) -> bool:
    return all(write.transfer.done for layer in sequence._layers for write in layer.writer.pending)


def test_a_sweep_that_ends_after_a_close_does_not_hold_it_up(store):
    begun(store, "layer")
    backlog = store.paths.backlog
    backlog._stop.set()  # what close() does before it waits for the thread, which is here:
    backlog._has_some.set()
    backlog.sweep()
    assert backlog._has_some.is_set(), "the thread would wait for ever, and close() for it"


def test_a_sweep_passes_by_a_layer_that_is_gone():
    class Gone:
        pass

    backlog = Backlog(sweep_interval_s=1e6)
    layer = Gone()
    backlog.add(layer)
    del layer
    backlog.sweep()
    assert not backlog._has_some.is_set()
    backlog.close()


def test_a_sweep_gives_the_memory_of_finished_writes_back(store):
    sequence, reference = begun(store, "layer")
    tails = leased(store)
    reference.append(sequence, 300)
    wait_until(lambda: is_over(sequence))
    assert leased(store) > tails
    backlog = store.paths.backlog
    assert backlog.account.nbytes > 0
    with sequence._layers[0].lock:
        other = threading.Thread(target=backlog.sweep)
        other.start()
        other.join()
    assert sequence._layers[0].is_writing, "it was in use"
    assert not sequence._layers[1].is_writing
    backlog.sweep()
    assert leased(store) == tails
    assert backlog.account.nbytes == 0
    assert not backlog._writing
    reference.check(sequence)


def test_it_comes_back_without_a_call(tmp_path):
    with open_store(tmp_path / "kv", capacity="64 MiB", flush_interval_s=None) as store:
        store.paths.backlog._sweep_interval_s = 0.01
        sequence, reference = begun(store, "layer")
        tails = leased(store)
        for _ in range(2):  # the thread goes on after it has found nothing more
            reference.append(sequence, 150)
            wait_until(lambda: leased(store) == tails)
        thread = store.paths.backlog._thread
    assert thread is not None
    assert not thread.is_alive()


def test_a_sequence_that_is_gone_is_not_waited_for(store):
    sequence, reference = begun(store, "layer")
    reference.append(sequence, 300)
    sequence.delete()
    del sequence
    backlog = store.paths.backlog
    backlog.sweep()
    other, reference = store.sequence("t", shape_of()), Reference(shape_of())
    backlog._limit_nbytes = 0
    reference.append(other, 300)
    reference.check(other)


def test_an_append_waits_for_the_oldest_writes_of_any_sequence(linked):
    store = linked.store
    store.paths.backlog._sweep_interval_s = 1e6
    store.paths.backlog._limit_nbytes = 50 << 10
    first, reference = begun(store, "layer", [10])
    second = store.sequence("t", shape_of())
    k, v = Reference(shape_of(), seed=5).tokens(7)
    linked.link.pause()
    reference.append(first, 300, layer=0)
    with pytest.raises(DeviceTimeout, match=r"not over after 0\.05 s"):
        second.append(0, k, v, timeout_s=0.05)
    assert second.tokens() == 0
    linked.link.resume()
    second.append(0, k, v, timeout_s=PATIENCE_S)
    assert second.tokens() == 7
    assert not first._layers[0].is_writing
    reference.check(first)


def test_a_layer_whose_write_failed_keeps_nobody_waiting(store):
    first, _ = begun(store, "layer", [10])
    second, reference = store.sequence("t", shape_of()), Reference(shape_of())
    Reference(shape_of(), seed=3).append(first, 300, layer=0)
    wait_until(lambda: is_over(first))
    first._layers[0].contents.failure = DeviceError("as if a write had failed")
    store.paths.backlog._limit_nbytes = 0
    reference.append(second, 300)
    store.paths.backlog.sweep()
    reference.check(second)
    with pytest.raises(DeviceError, match="as if"):
        first.settle(0)
    first._layers[0].contents.failure = None


def test_a_sweep_forgets_a_layer_whose_write_failed(store):
    first, _ = begun(store, "layer", [10, 300])
    wait_until(lambda: is_over(first))
    first._layers[0].contents.failure = DeviceError("as if a write had failed")
    backlog = store.paths.backlog
    backlog.sweep()
    assert first._layers[0].is_writing, "nobody settled it"
    assert not first._layers[1].is_writing, "the others are settled all the same"
    assert not backlog._writing
    first._layers[0].contents.failure = None
