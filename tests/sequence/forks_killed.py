"""What `store/killing.py` does with forks: sequences that begin alike, kept under kill -9.

The note of a sequence has the epoch in which each of its tokens was appended; it is recorded in one
step with them, so that it says what a sequence has to hold, whenever it was recorded.
"""

from __future__ import annotations

import random
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import spdk_kv
from spdk_kv.errors import CapacityError

MOST = 48
"""Names there are at most."""
SHAPE = spdk_kv.KVShape(2, 2, 40, torch.float16, None, batch=3)
_MOST_TOKENS = 500


@lru_cache(maxsize=20_000)
def token_of(layer: int, place: int, epoch: int) -> torch.Tensor:
    """K and V of a token, ``[2, batch, kv_heads, head_dim]``."""
    chance = np.random.default_rng([layer, place, epoch])
    return torch.from_numpy(chance.standard_normal((2, 3, 2, 40))).to(torch.float16)


def tokens_of(layer: int, first: int, epochs: np.ndarray) -> Any:
    if not len(epochs):
        return torch.empty(2, 3, 2, 0, 40, dtype=torch.float16)
    each = [token_of(layer, first + i, int(epoch)) for i, epoch in enumerate(epochs)]
    return torch.stack(each, dim=3)


def check(sequence: spdk_kv.Sequence) -> None:
    """It holds what its note says."""
    epochs = np.frombuffer(sequence.note, np.int64)
    for layer in range(SHAPE.layers):
        count = sequence.tokens(layer)
        assert count <= len(epochs), f"{sequence.name}: {count} tokens, {len(epochs)} noted"
        wanted = tokens_of(layer, 0, epochs[:count])
        found = sequence.read(layer)
        assert all(map(torch.equal, found, wanted)), f"{sequence.name}: other bytes"


def check_all(store: spdk_kv.KVStore, durable: np.ndarray, deleted: np.ndarray) -> None:
    """Every sequence holds what its note says, and none that was durable is missing."""
    there = store.sequences()
    for name in there:
        check(store.sequence(name))
    for number in np.flatnonzero(durable & ~deleted & 1):
        assert str(number) in there, f"{number} was durable and is gone"


def change(
    store: spdk_kv.KVStore,
    durable: np.ndarray,
    deleted: np.ndarray,
    epoch: np.ndarray,
    rng: random.Random,
) -> None:
    """Some appends, truncations, forks and deletions. ``durable``, ``deleted``: of each name,
    whether it was flushed, and whether it may be gone."""
    names = store.sequences()
    for _ in range(rng.randrange(1, 8)):
        try:
            _change_one(store, names, deleted, durable, epoch, rng)
        except CapacityError:
            if names:
                _delete(store, rng.choice(names), names, deleted)
        except spdk_kv.KeyNotFound:  # it made room for another one
            names[:] = store.sequences()
    while names and store.stats()["largest_free_nbytes"] < 1 << 20:  # for blobs
        _delete(store, rng.choice(names), names, deleted)
        store.flush()


def _change_one(
    store: spdk_kv.KVStore,
    names: list[str],
    deleted: np.ndarray,
    durable: np.ndarray,
    epoch: np.ndarray,
    rng: random.Random,
) -> None:
    free = [str(number) for number in range(MOST) if str(number) not in names]
    if not names:
        _begin(free[0], names, deleted, durable)
        store.sequence(free[0], SHAPE)
        return
    name = rng.choice(names)
    sequence = store.sequence(name)
    least = min(sequence.tokens(layer) for layer in range(SHAPE.layers))
    what = rng.choices(["append", "cut", "fork", "delete", "begin"], [8, 2, 4, 1, 1])[0]
    if what == "append" and least < _MOST_TOKENS:
        sequence.truncate(least)  # a kill may have come between two layers
        epoch += 1
        more = rng.choice([1, 1, 2, 30, 80])
        new = np.full(more, epoch[0], np.int64)
        sequence.note = sequence.note[: 8 * least] + new.tobytes()
        for layer in range(SHAPE.layers):
            sequence.append(layer, *tokens_of(layer, least, new))
    elif what == "cut":
        keep = rng.randrange(least + 1)
        sequence.truncate(keep)
        sequence.note = sequence.note[: 8 * keep]
    elif what == "fork" and free:
        temporary = rng.random() < 0.3
        if not temporary:
            _begin(free[0], names, deleted, durable)
        keep = rng.choice([None, least, rng.randrange(least + 1)])
        made = sequence.fork(None if temporary else free[0], tokens=keep)
        if temporary:
            check(made)
            made.delete()
    elif what == "delete":
        _delete(store, name, names, deleted)
    elif what == "begin" and free:
        _begin(free[0], names, deleted, durable)
        store.sequence(free[0], SHAPE)


def _begin(name: str, names: list[str], deleted: np.ndarray, durable: np.ndarray) -> None:
    names.append(name)
    durable[int(name)] = 0
    deleted[int(name)] = 0


def _delete(store: spdk_kv.KVStore, name: str, names: list[str], deleted: np.ndarray) -> None:
    deleted[int(name)] = 1
    names.remove(name)
    with suppress(spdk_kv.KeyNotFound):  # it may have had no room to begin
        store.sequence(name).delete()


def flushed(store: spdk_kv.KVStore, durable: np.ndarray) -> None:
    """A flush is over."""
    for name in store.sequences():
        if not store.sequence(name).temporary:
            durable[int(name)] = 1
