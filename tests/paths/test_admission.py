"""Who is admitted to read ahead: what is held counts, and who was left alone gives way."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from sequence.helpers import shape_of
from spdk_kv import Sequence
from spdk_kv.store import KVStore
from store.helpers import open_store
from support.waiting import PATIENCE_S

LAYERS = 4
SHAPE = shape_of(layers=LAYERS, batch=1, max_tokens=300)


@pytest.fixture
def store():
    # Room to read two layers of 300 tokens ahead.
    with open_store("ram://", capacity="64 MiB", staging="1 MiB") as opened:
        opened.paths.ahead.limit_nbytes = 200 << 10
        yield opened


@pytest.fixture
def now(store) -> list[float]:
    """The admission's clock."""
    seconds = [0.0]
    store.paths.ahead._clock = lambda: seconds[0]
    return seconds


def filled(store: KVStore, name: str) -> Sequence:
    sequence = store.sequence(name, SHAPE, temporary=True)
    k = torch.zeros(1, 3, 299, 20, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        sequence.append(layer, k, k)
        sequence.settle(layer)
    return sequence


def ahead(sequence: Sequence) -> list[int]:
    """The layers of which something is read ahead."""
    layers = range(LAYERS)
    return [n for n in layers if sequence._layers[n].reader.prefetched.reading is not None]


def test_a_sequence_left_alone_gives_way_to_one_in_use(store, now):
    idle, busy = filled(store, "idle"), filled(store, "busy")
    idle.prefetch(range(LAYERS))
    held = ahead(idle)
    assert held
    assert len(held) < LAYERS, "there is room for all"
    now[0] += 1
    busy.prefetch(range(LAYERS))
    assert (ahead(idle), ahead(busy)) == (held, []), "one that takes turns keeps what it has"
    now[0] += 1.5
    busy.read(3)  # what was asked for goes on behind a read
    assert (ahead(idle), ahead(busy)) == ([], held)
    assert idle.read(0)[0].shape[2] == 299
    # It is in use again, and the other one not yet idle.
    idle.prefetch(range(LAYERS))
    assert (ahead(idle), ahead(busy)) == ([], held)


def test_the_one_idle_for_longest_gives_way_first(store, now):
    first, second, busy = (filled(store, name) for name in ("a", "b", "c"))
    second.prefetch([0])
    now[0] += 1
    first.prefetch([0])
    now[0] += 1
    second.read(1)
    now[0] += 2.5
    busy.prefetch([2])
    assert (ahead(first), ahead(second), ahead(busy)) == ([], [0], [2])


def test_a_layer_in_use_keeps_what_was_read_ahead_and_gives_it_up_later(store, now):
    idle, busy = filled(store, "idle"), filled(store, "busy")
    idle.prefetch([0, 1])
    assert ahead(idle) == [0, 1]
    now[0] += 3
    holds, done = threading.Event(), threading.Event()

    def use() -> None:
        with idle._layers[0].lock:
            holds.set()
            done.wait(PATIENCE_S)

    user = threading.Thread(target=use)
    user.start()
    assert holds.wait(PATIENCE_S)
    busy.prefetch([0, 1])
    assert (ahead(idle), ahead(busy)) == ([0], [0])
    done.set()
    user.join()
    now[0] += 3
    busy.read(3)
    assert (ahead(idle), ahead(busy)) == ([], [0, 1])


def test_what_a_forgotten_sequence_held_is_free_again(store):
    sequence = filled(store, "s")
    sequence.prefetch([0, 1])
    assert store.paths.ahead.held_nbytes > 0
    sequence.delete()
    assert store.paths.ahead.held_nbytes == 0
    # Also where nobody says so, as after an interrupt between a reading and its note.
    hold = store.paths.ahead.hold(1000)
    assert store.paths.ahead.held_nbytes == 1000
    del hold
    gc.collect()
    assert store.paths.ahead.held_nbytes == 0
