"""A writer that is read beside, as a program of its own: readers judge every byte that they get.

    python reading_beside.py FOLDER ROUNDS SEED (blobs|sequences) [ENGINE]

Payloads say whose they are and of which version (helpers.payload), tokens are made of their number
and the sequence's version. It says "begins" once there is something to be read, and ends after
ROUNDS rounds, but not before its standard input does.
"""

from __future__ import annotations

import random
import select
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import spdk_kv
from store.helpers import open_store, payload

KEYS = [f"key {number}" for number in range(12)]
SHAPE = spdk_kv.KVShape(2, 2, 32, torch.int32, 600, batch=1)
NAMES = ["s0", "s1", "s2"]


def token_rows(
    version: int, layer: int, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, each element of which says version, layer and token."""
    numbers = torch.arange(first, first + count, dtype=torch.int32).view(1, 1, count, 1)
    k = (version * 2000 + layer * 1000 + numbers).expand(1, 2, count, 32).contiguous()
    return k, -k


def change_blobs(store: spdk_kv.KVStore, rng: random.Random, version: int) -> None:
    for key in rng.sample(KEYS, rng.randrange(1, 6)):
        if rng.random() < 0.2:
            store.delete(key)
        else:
            store.put(key, payload(key, version, 16 + rng.randrange(200_000)))


def change_sequences(store: spdk_kv.KVStore, rng: random.Random, version: int) -> None:
    name = rng.choice(NAMES)
    sequence = store.sequence(name, SHAPE)
    what = rng.random()
    if what < 0.25:
        sequence.delete()
        store.flush()
        sequence = store.sequence(name, SHAPE)
    elif what < 0.4:
        other = rng.choice([each for each in NAMES if each != name])
        if other in store.sequences():
            store.sequence(other).delete()
        sequence = sequence.fork(other, tokens=rng.randrange(sequence.tokens() + 1))
    elif what < 0.6:
        sequence.truncate(rng.randrange(sequence.tokens() + 1))
    first = sequence.tokens()
    count = rng.randrange(min(150, 600 - first) + 1)
    for layer in range(SHAPE.layers):
        sequence.append(layer, *token_rows(version, layer, first, count))


def main() -> None:
    folder, rounds, seed, what = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    engine = sys.argv[5] if sys.argv[5:] else None
    torch.set_num_threads(1)
    rng = random.Random(seed)
    change = change_blobs if what == "blobs" else change_sequences
    store = open_store(folder, capacity="4 MiB", engine=engine)
    for version in count(1):
        if version > rounds and select.select([sys.stdin], [], [], 0)[0]:
            break
        change(store, rng, version)
        # Not each round: what is not flushed goes into space that a reader may be reading.
        if rng.random() < 0.7:
            store.flush()
        if version == 10:
            print("begins", flush=True)
        if version > 10 and rng.random() < 0.02:
            store.close()
            store = open_store(folder, capacity="4 MiB", engine=engine)
    store.close()


if __name__ == "__main__":
    main()
