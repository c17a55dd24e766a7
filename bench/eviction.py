"""How much a full store evicts for what is put, and what that costs in time.

    python bench/eviction.py [--puts 100000] [--capacity "4 GiB"]

Random puts into a store on null:// that is 95 % full, a quarter of them followed by a get of a
random key. No bytes are moved: the figures are those of our own code. "Evicted" counts the bytes of
the blobs that had to go; more is evicted at once than a single put needs, for those to come.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

import spdk_kv
from spdk_kv.units import KIB, MIB, align_up, parse_nbytes

BUFFER = np.zeros(16 * MIB, np.uint8)
MIXED = [4 * KIB, 64 * KIB, 256 * KIB, MIB, 16 * MIB]


def sizes_of(kind: str, chance: random.Random) -> Callable[[], int]:
    """Draws the size of a blob."""
    if kind == "mixed":
        return lambda: chance.choices(MIXED, [40, 30, 20, 9, 1])[0]
    if kind == "uniform":
        return lambda: chance.randrange(1, 2 * MIB)
    return lambda: chance.choice([4 * KIB, 8 * KIB, 16 * KIB])


def measure(kind: str, puts: int, capacity: str) -> dict[str, float]:
    """One store's figures: ratios of bytes, and microseconds per put."""
    chance = random.Random(1)
    draw = sizes_of(kind, chance)
    took_us, asked, number, usage = [], 0, 0, []
    with spdk_kv.open("null://", capacity=capacity, flush_interval_s=None) as store:
        allocator = store.catalog.records.extents.allocator
        while allocator.used_nbytes < 0.95 * allocator.capacity_nbytes:
            store.put(str(number), BUFFER[: draw()])
            number += 1
        held = allocator.used_nbytes
        for turn in range(puts):
            nbytes = draw()
            began = time.perf_counter_ns()
            store.put(str(number), BUFFER[:nbytes])
            took_us.append((time.perf_counter_ns() - began) / 1e3)
            number += 1
            asked += align_up(nbytes, 4 * KIB)
            usage.append(allocator.used_nbytes)
            key = str(chance.randrange(max(0, number - 2 * len(store)), number))
            if turn % 4 == 0 and key in store:
                store.get(key)
        evicted = held + asked - allocator.used_nbytes
        took_us.sort()
        return {
            "blobs": len(store),
            "asked_mib": asked // MIB,
            "evicted_over_asked": evicted / asked,
            "least_fill": min(usage) / allocator.capacity_nbytes,
            "mean_fill": statistics.fmean(usage) / allocator.capacity_nbytes,
            "put_us_mean": statistics.fmean(took_us),
            "put_us_median": statistics.median(took_us),
            "put_us_p99": took_us[len(took_us) * 99 // 100],
            "put_us_most": took_us[-1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--puts", type=int, default=100_000)
    parser.add_argument("--capacity", default="4 GiB", help="of the stores with large blobs")
    options = parser.parse_args()
    for kind in ("mixed", "uniform", "small"):
        # As many small blobs as a few hundred MiB hold: about 100,000.
        capacity = "1 GiB" if kind == "small" else options.capacity
        found = measure(kind, options.puts, str(parse_nbytes(capacity)))
        print(kind, json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
