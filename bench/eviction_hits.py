"""How often what is asked for is still there, by what a full store evicts.

    python bench/eviction_hits.py [--requests 100000] [--blobs 4000] [--json FILE]

Each request gets a blob of 4 KiB, or puts it where it is not there, in a store on null:// that
holds --blobs of them. The store's own policies, and beside them S3-FIFO (Yang et al., SOSP 2023) in
a few lines of its own, which knows nothing of the places on a drive.

Zipf: keys as often as their rank to a power says. Prompts: three requests in a hundred are for one
of a few hot ones, the rest come once. Conversations: most are asked for five times within a while
and then never again. Floods: Zipf, and every other twenty thousand requests come once. Shifting:
Zipf's law of other keys after each sixth.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

import spdk_kv

_BLOB = np.zeros(4096, np.uint8)
POLICIES = ("slru", "lru")


def zipf(requests: int, keys: int, power: float, seed: int) -> list[int]:
    """Keys, the first one most often."""
    chances = 1 / np.arange(1, keys + 1) ** power
    chosen = np.random.default_rng(seed).choice(keys, requests, p=chances / chances.sum())
    return [int(key) for key in chosen]


def prompts(requests: int, hot: int, fresh: Iterator[int]) -> list[int]:
    chance = random.Random(1)
    return [
        chance.randrange(hot) if chance.random() < 0.03 else next(fresh) for _ in range(requests)
    ]


def conversations(requests: int, hot: int, blobs: int, fresh: Iterator[int]) -> list[int]:
    chance = random.Random(2)
    live: list[list[int]] = []
    found = []
    for _ in range(requests):
        drawn = chance.random()
        if drawn < 0.03:
            found.append(chance.randrange(hot))
        elif live and drawn < 0.8:
            at = chance.randrange(len(live))
            found.append(live[at][0])
            live[at][1] -= 1
            if not live[at][1] or len(live) > blobs // 3:
                live[at] = live[-1]
                live.pop()
        else:
            live.append([next(fresh), 4])
            found.append(live[-1][0])
    return found


def floods(requests: int, keys: int, fresh: Iterator[int]) -> list[int]:
    found = zipf(requests, keys, 0.9, 3)
    for begin in range(20_000, requests, 40_000):
        found[begin : begin + 20_000] = [next(fresh) for _ in found[begin : begin + 20_000]]
    return found


def shifting(requests: int, keys: int) -> list[int]:
    each = requests // 6
    return [key + part * keys // 3 for part in range(6) for key in zipf(each, keys, 1.0, 10 + part)]


def traces(requests: int, blobs: int) -> Iterator[tuple[str, list[int]]]:
    """Each with its name."""
    fresh = count(10_000_000)
    for power in (0.6, 0.8, 1.0):
        yield f"Zipf {power}", zipf(requests, 10 * blobs, power, 1)
    yield "prompts", prompts(requests, blobs // 20, fresh)
    yield "conversations", conversations(requests, blobs // 20, blobs, fresh)
    yield "floods", floods(requests, 3 * blobs, fresh)
    yield "shifting", shifting(requests, 5 * blobs)


def in_store(policy: str, trace: list[int], blobs: int) -> float:
    """The share of hits."""
    hits = 0
    with spdk_kv.open("null://", capacity=blobs * 4096, eviction=policy) as store:  # type: ignore[arg-type]
        for number in trace:
            key = str(number)
            if key in store:
                store.get(key, out=_BLOB)
                hits += 1
            else:
                store.put(key, _BLOB)
    return hits / len(trace)


def s3_fifo(trace: list[int], blobs: int) -> float:
    """The share of hits."""
    small: OrderedDict[int, int] = OrderedDict()
    main: OrderedDict[int, int] = OrderedDict()
    ghosts: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in trace:
        if (queue := small if key in small else main if key in main else None) is not None:
            queue[key] = min(3, queue[key] + 1)
            hits += 1
            continue
        while len(small) + len(main) >= blobs:
            if len(small) > blobs // 10 or not main:
                victim, uses = small.popitem(last=False)
                if uses:
                    main[victim] = 0
                    continue
                ghosts[victim] = None
                if len(ghosts) > blobs:
                    ghosts.popitem(last=False)
            else:
                victim, uses = main.popitem(last=False)
                if uses:
                    main[victim] = uses - 1
        if key in ghosts:
            del ghosts[key]
            main[key] = 0
        else:
            small[key] = 0
    return hits / len(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--blobs", type=int, default=4000, help="that the store holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    ways: dict[str, Callable[[list[int]], float]] = {
        policy: lambda trace, policy=policy: in_store(policy, trace, arguments.blobs)  # type: ignore[misc]
        for policy in POLICIES
    }
    ways["S3-FIFO"] = lambda trace: s3_fifo(trace, arguments.blobs)
    rows = []
    print(f"| trace | {' | '.join(ways)} |")
    print(f"| --- |{' --- |' * len(ways)}")
    for name, trace in traces(arguments.requests, arguments.blobs):
        found = {way: measure(trace) for way, measure in ways.items()}
        rows.append({"trace": name, **found})
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in found.values())} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
