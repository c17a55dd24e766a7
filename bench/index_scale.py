"""What a store of very many small blobs costs: memory, time to open and to close, puts and gets.

    python bench/index_scale.py [--counts N,N,...] [--folder DIR] [--json FILE]

Each figure is taken in a process of its own. ``null://`` keeps no bytes, so that a put and a get
are what the store itself costs: blobs of 4 KiB, a thousand in a call, keys of 64 characters. Memory
is the growth of what is resident (the heap trimmed before), per blob. To be opened and closed there
is a store of as many blobs in DIR, with a data file that is one hole: their index is real, and all
bytes are zeroes. It is opened without its summary, which reads each row; as it was closed; and as a
kill left it after 2000 changes. Rates and times come twice: by the clock, and by the time that the
process had a processor, which others on the machine change less.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import machine
import spdk_kv
from spdk_kv._native.checksum import crc32c
from spdk_kv.index import BlobRecord, Index

NBYTES = 4096
BATCH = 1000
# Puts and gets that a rate is measured over, in rounds of which the median counts.
MEASURED = 50_000
ROUNDS = 5
# Blobs that are deleted and put again before a kill.
CHANGED = 1000
DATA_START = 1 << 20
# tracemalloc makes everything several times slower.
MOST_TRACED = 300_000


def key_of(number: int) -> str:
    """64 characters that look like a hash; the same ones each time."""
    mixed = number * 0x9E3779B97F4A7C15 % (1 << 64)
    return f"{mixed:016x}" * 3 + f"{number:016x}"


def resident() -> int:
    """Bytes of this process in memory, without what is only kept for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))


def batches(first: int, last: int) -> Iterator[list[str]]:
    for at in range(first, last, BATCH):
        yield [key_of(number) for number in range(at, min(at + BATCH, last))]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of this process."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def median_rate(rounds: list[tuple[float, float]], count: int) -> dict[str, float]:
    return {
        "per_s": count / sorted(clock for clock, _ in rounds)[len(rounds) // 2],
        "per_cpu_s": count / sorted(cpu for _, cpu in rounds)[len(rounds) // 2],
    }


def open_null(count: int) -> spdk_kv.KVStore:
    return spdk_kv.open("null://", capacity=count * NBYTES, eviction="none")


def rates(count: int) -> dict[str, Any]:
    """Memory per blob, and puts and gets per second, with about ``count`` blobs stored."""
    arrays = [np.zeros(NBYTES, np.uint8) for _ in range(BATCH)]
    measured = min(MEASURED, count // 2)
    found: dict[str, Any] = {}
    with open_null(count + BATCH) as store:
        store.put("first", arrays[0])  # what the first one brings into memory is not the others'
        store.get("first", out=arrays[0])
        before = resident()
        filled = count - measured
        for keys in batches(0, filled):
            store.put_many(dict(zip(keys, arrays, strict=False)))
        store.flush()
        found["memory_nbytes"] = (resident() - before) / filled
        chance = random.Random(1)
        random_keys = [key_of(chance.randrange(filled)) for _ in range(measured)]
        puts, gets, plain, deletes = [], [], [], []
        fresh = [dict(zip(keys, arrays, strict=False)) for keys in batches(filled, count)]
        for _ in range(ROUNDS):
            puts.append(timed(lambda: [store.put_many(each) for each in fresh]))
            parts = [random_keys[at : at + BATCH] for at in range(0, measured, BATCH)]
            gets.append(
                timed(lambda parts=parts: [store.get_many(p, out=arrays[: len(p)]) for p in parts])
            )
            plain.append(
                timed(lambda parts=parts: [store.get_many(p, as_numpy=True) for p in parts])
            )
            deletes.append(timed(lambda: [store.delete(key) for each in fresh for key in each]))
            store.flush()
        found["put_many"] = median_rate(puts, measured)
        found["get_many_out"] = median_rate(gets, measured)
        found["get_many"] = median_rate(plain, measured)
        found["delete"] = median_rate(deletes, measured)
    return found


def traced(count: int) -> dict[str, Any]:
    """Bytes that Python's allocators hold per blob."""
    arrays = [np.zeros(NBYTES, np.uint8) for _ in range(BATCH)]
    with open_null(count + BATCH) as store:
        store.put("first", arrays[0])
        tracemalloc.start()
        for keys in batches(0, count):
            store.put_many(dict(zip(keys, arrays, strict=False)))
        store.flush()
        del keys
        gc.collect()
        return {"traced_nbytes": tracemalloc.get_traced_memory()[0] / count}


def make(folder: Path, count: int) -> None:
    """Begins a store of ``count`` blobs of zeroes."""
    spdk_kv.open(f"file://{folder}", capacity=max(1 << 20, count * NBYTES)).close()
    crc = crc32c(bytes(NBYTES))
    with closing(Index(folder / "index.sqlite")) as index:
        for keys in batches(0, count):
            first = int(keys[0][-16:], 16)
            records = {
                key: BlobRecord(DATA_START + at * NBYTES, NBYTES, "uint8", (NBYTES,), crc)
                for at, key in enumerate(keys, first)
            }
            index.commit(records, {})
    with open(folder / "data", "r+b") as data:
        data.truncate(DATA_START + count * NBYTES)


def kill(folder: Path, count: int) -> None:
    """Changes some blobs, commits that, and ends without closing the store."""
    zeroes = np.zeros(NBYTES, np.uint8)
    engine = spdk_kv.EngineOptions("pagecache", depth=4, segment="64 KiB")
    store = spdk_kv.open(f"file://{folder}", engine=engine, flush_interval_s=None)
    changed = [key_of(number) for number in range(min(CHANGED, count // 2))]
    for key in changed:
        store.delete(key)
    store.flush()
    store.put_many(dict.fromkeys(changed, zeroes))
    store.flush()
    print("{}", flush=True)
    os._exit(0)


def opening(folder: Path, count: int) -> dict[str, Any]:
    """Seconds to open a store that is there, and to close it after one get."""
    stores: list[spdk_kv.KVStore] = []
    engine = spdk_kv.EngineOptions("pagecache", depth=4, segment="64 KiB")
    before = resident()

    def open_it() -> None:
        uri = f"file://{folder}"
        stores.append(spdk_kv.open(uri, engine=engine, flush_interval_s=None))

    opened = timed(open_it)
    memory = resident() - before
    (store,) = stores
    assert len(store) == count, len(store)
    assert not store.get(key_of(count // 2), as_numpy=True).any()
    closed = timed(store.close)
    return {
        "open_s": opened[0],
        "open_cpu_s": opened[1],
        "close_s": closed[0],
        "close_cpu_s": closed[1],
        "opened_memory_nbytes": memory / count,
    }


def alone(*arguments: str) -> dict[str, Any]:
    """What this program prints with ``arguments``, in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def measure(count: int, folder: Path) -> dict[str, Any]:
    found = alone("--part", "rates", "--counts", str(count))
    if count <= MOST_TRACED:
        found |= alone("--part", "traced", "--counts", str(count))
    place = folder / f"{count}"
    if not (place / "made").exists():
        place.mkdir(parents=True)
        make(place, count)
        (place / "made").touch()
    for which in ("rows", "closed", "killed"):
        arguments = ("--counts", str(count), "--folder", str(place))
        if which == "rows":
            (place / "index.sqlite-blobs").unlink(missing_ok=True)
        if which == "killed":
            alone("--part", "kill", *arguments)
        part = alone("--part", "opening", *arguments)
        found |= {f"{which}_{name}": value for name, value in part.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", default="50000,300000,5000000")
    parser.add_argument("--folder", type=Path, help="keeps the stores made there for another time")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--part", choices=("rates", "traced", "opening", "kill"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    counts = [int(count) for count in given.counts.split(",")]
    if given.part == "opening":
        print(json.dumps(opening(given.folder, counts[0])))
    elif given.part == "kill":
        kill(given.folder, counts[0])
    elif given.part:
        print(json.dumps({"rates": rates, "traced": traced}[given.part](counts[0])))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = given.folder or Path(temporary)
            found = {str(count): measure(count, folder) for count in counts}
        report = {"commit": machine.commit(), "blobs": found}
        text = json.dumps(report, indent=2)
        print(text)
        if given.json:
            given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
