"""How fast a store is that puts and deletes all the time, with free space given back and without.

    python bench/churn.py --dir DIR [--rounds N] [--seconds S]

Blobs of 64 KiB to 8 MiB are put into a store of 1 GiB on DIR, and the oldest ones deleted, so that
half of it (or, ``full``, all but a sixteenth) is in use; a thread flushes once a second. Each round
runs every setting of ``EngineOptions.discard`` once, in another order; the ratio to ``False`` is
that of the same round.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import spdk_kv

MIB = 1 << 20
CAPACITY_NBYTES = 1024 * MIB
SIZES = [64 << 10, 256 << 10, MIB, 2 * MIB, 8 * MIB]
SETTINGS: tuple[bool | None, ...] = (False, None)


def churn(folder: Path, discard: bool | None, share: float, seconds: float, seed: int) -> dict:
    """Puts and deletes for ``seconds``; MiB/s of puts, their slowest in ms, and what was given
    back in MiB."""
    rng = random.Random(seed)
    source = np.random.default_rng(seed).integers(0, 256, 8 * MIB, np.uint8)
    options = spdk_kv.EngineOptions(discard=discard)
    held: list[tuple[str, int]] = []
    nbytes = put_nbytes = number = 0
    slowest = 0.0
    with spdk_kv.open(
        folder, capacity=CAPACITY_NBYTES, engine=options, flush_interval_s=1.0
    ) as store:
        # The first fill, with each place written once, does not count.
        begin, is_counted = time.monotonic(), False
        while True:
            now = time.monotonic()
            if not is_counted and now - begin > seconds / 2:
                begin, is_counted, put_nbytes, slowest = now, True, 0, 0.0
            if is_counted and now - begin > seconds:
                break
            size = rng.choice(SIZES)
            while held and nbytes + size > share * CAPACITY_NBYTES:
                key, old = held.pop(rng.randrange(len(held)))
                store.delete(key)
                nbytes -= old
            number += 1
            store.put(str(number), source[:size])
            slowest = max(slowest, time.monotonic() - now)
            held.append((str(number), size))
            nbytes += size
            put_nbytes += size
        took = time.monotonic() - begin
        given = store.stats()["discarded_nbytes"]
    return {
        "MiB/s": put_nbytes / took / MIB,
        "slowest put, ms": slowest * 1e3,
        "given back, MiB": given / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0)
    given = parser.parse_args()
    for name, share in (("half", 0.5), ("full", 15 / 16)):
        runs: dict[bool | None, list[dict]] = {setting: [] for setting in SETTINGS}
        for number in range(given.rounds):
            order = SETTINGS if number % 2 else SETTINGS[::-1]
            for setting in order:
                folder = Path(tempfile.mkdtemp(prefix="spdk_kv-churn-", dir=given.dir))
                try:
                    runs[setting].append(churn(folder, setting, share, given.seconds, number))
                finally:
                    shutil.rmtree(folder)
        for setting, found in runs.items():
            for what in found[0]:
                middle = statistics.median(run[what] for run in found)
                print(f"{name}: discard={setting}: {what}: {middle:,.1f}")
        pairs = zip(runs[None], runs[False], strict=True)
        ratios = sorted(new["MiB/s"] / old["MiB/s"] for new, old in pairs)
        print(
            f"{name}: None to False: {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
