"""A store in daily life, shortened: threads, interrupts and kills at 95 % fill, every byte checked.

    python bench/soak.py [--dir DIR] [--minutes 30] [--engine NAME] [--seed N] [--json FILE]

One process after the other opens the same store. Its threads put, get, delete and flush blobs, and
create, append to, read, truncate and delete sequences, until the process is stopped: in order, by
a kill, or after a storm of Ctrl-C. What was begun, done and flushed stands in a file that outlives
the process, so that the next one knows what must be there, and every read knows what it may see: a
version that had been begun, and none older than what was done before. Contents are computed from
the key, the version and the position, so a byte of anything else is noticed.

Prints a line per life and a table. The exit status is 1 for a wrong byte, a lost one, an error that
is not one of spdk_kv's, a close or an opening that fails, or memory or descriptors that grow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

MIB = 1 << 20
CAPACITY_NBYTES = 512 * MIB
FILL = 0.95  # of the capacity, when a life begins
THREADS, MAIN = 8, 0
KEYS = 1500  # some 700 MiB: more than there is room for, so the store stays full
SLOTS = 12  # sequences
LAYERS, HEADS, DIM, MAX_TOKENS = 3, 2, 32, 4096
WARM_UP_S = 20.0
SAMPLE_S = 1.0
# What a process may hold more at its end than after its warm-up: the allocator's fragments.
GROWTH_NBYTES = 48 * MIB
GROWTH_FDS = 8
CLOSE_S = 60.0
FAULTS_SHOWN = 5  # of a process


class Ledger:
    """What was begun, done and flushed, in a file that survives a kill."""

    def __init__(self, path: Path, create: bool = False) -> None:
        fields = np.dtype(
            [
                ("begun", np.int64, KEYS),
                ("done", np.int64, KEYS),
                ("flushed", np.int64, KEYS),
                # Of a sequence: the life that was created last, the one that is known to be
                # recorded (0: none), and the tokens that it had then.
                ("life", np.int64, SLOTS),
                ("flushed_life", np.int64, SLOTS),
                ("flushed_tokens", np.int64, (SLOTS, LAYERS)),
            ]
        )
        self.fields = np.memmap(path, fields, "w+" if create else "r+", shape=(1,))[0]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class Fault(Exception):
    """Something that must never happen."""


# -- contents --------------------------------------------------------------------------------------


def blob_nbytes(key: int, version: int) -> int:
    """Between 4 KiB and 4 MiB, small ones more often; differs from version to version."""
    return int(4096 * 2 ** random.Random(f"{key} {version}").uniform(0, 10))


def blob_bytes(key: int, version: int) -> np.ndarray:
    nbytes = blob_nbytes(key, version) // 8 * 8
    words = np.random.Generator(np.random.SFC64([key, version])).integers(
        0, 1 << 63, nbytes // 8, dtype=np.int64
    )
    words[0], words[1] = key, version
    return words


def rows(slot: int, life: int, layer: int, value: int, begin: int, end: int) -> Any:
    """K (``value`` 0) or V (1) of tokens ``begin`` to ``end``: ``[1, HEADS, tokens, DIM]``."""
    import torch

    seed = (slot * 1_000_003 + life * 10_007 + layer * 101 + value * 13) & 0x7FFF
    tokens = np.arange(begin, end, dtype=np.int64)[None, :, None]
    heads = np.arange(HEADS, dtype=np.int64)[:, None, None]
    dims = np.arange(DIM, dtype=np.int64)[None, None, :]
    bits = (seed + tokens * 977 + heads * 331 + dims * 7 + life * 31) & 0xFFFF
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)[None].copy()).view(torch.bfloat16)


def same(left: Any, right: Any) -> bool:
    import torch

    return left.shape == right.shape and bool(
        torch.equal(left.contiguous().view(torch.int16), right.contiguous().view(torch.int16))
    )


# -- one process -----------------------------------------------------------------------------------


class Life:
    """A process that works on the store until it is told to stop, on ``THREADS`` threads."""

    def __init__(self, folder: Path, engine: str | None, seed: int) -> None:
        import spdk_kv

        self.module = spdk_kv
        self.ledger = Ledger(folder / "ledger")
        self.seed = seed
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.fill: list[float] = []
        self.faults: list[str] = []
        self.interruptible = False
        self.keys = [threading.Lock() for _ in range(KEYS)]
        self.slots = [threading.Lock() for _ in range(SLOTS)]
        self.held: list[Any] = [None] * SLOTS
        options: dict[str, Any] = {"flush_interval_s": 0.5}
        if engine:
            options["engine"] = engine
        self.store = spdk_kv.open(
            f"file://{folder}/store", capacity=CAPACITY_NBYTES, create=True, **options
        )

    # A blob. One thread writes it at a time, any number read it.

    def put(self, rng: random.Random, kind: str) -> None:
        key = rng.randrange(KEYS)
        with self.keys[key]:
            version = int(self.ledger["begun"][key]) + 1
            self.ledger["begun"][key] = version
            name = f"blob {key}"
            try:
                if kind == "delete":
                    self.store.delete(name)
                elif kind == "put_async":
                    self.store.put_async(name, blob_bytes(key, version)).result(CLOSE_S)
                elif kind == "put":
                    self.store.put(name, blob_bytes(key, version))
                else:
                    self.store.put_many({name: blob_bytes(key, version)}, timeout_s=30)
            except self.module.CapacityError:
                self.counts["no room"] += 1
                return
            # A version that was deleted is "nothing": whoever finds nothing is never wrong here,
            # because the store may evict.
            self.ledger["done"][key] = version

    def get(self, rng: random.Random, kind: str) -> None:
        key = rng.randrange(KEYS)
        oldest = int(self.ledger["done"][key])
        try:
            if kind == "get":
                found = self.store.get(f"blob {key}", as_numpy=True)
            elif kind == "get_async":
                found = self.store.get_async(f"blob {key}", as_numpy=True).result(CLOSE_S)
            else:
                found = self.store.get_many([f"blob {key}"], as_numpy=True)[0]
        except self.module.KeyNotFound:
            self.counts["not found"] += 1
            return
        self.check_blob(key, found, oldest)

    def check_blob(self, key: int, found: np.ndarray, oldest: int) -> None:
        version = int(found[1]) if found.size > 1 else -1
        newest = int(self.ledger["begun"][key])
        if int(found[0]) != key or not oldest <= version <= newest:
            raise Fault(f"blob {key}: version {version}, which is not of {oldest} to {newest}")
        if not np.array_equal(found, blob_bytes(key, version)):
            raise Fault(f"blob {key}: other bytes in version {version}")
        self.counts["bytes checked"] += found.nbytes

    # A sequence. One thread changes it at a time; it is read meanwhile.

    def sequence(self, slot: int, create: bool) -> Any:
        """The caller holds the slot's lock."""
        shape = self.module.KVShape(
            layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16", max_tokens=MAX_TOKENS
        )
        name = f"sequence {slot}"
        if self.held[slot] is None:
            if name not in self.store.sequences():
                if not create:
                    return None
                self.ledger["flushed_life"][slot] = 0
                self.ledger["life"][slot] += 1
            self.held[slot] = self.store.sequence(name, shape)
        return self.held[slot]

    def append(self, rng: random.Random) -> None:
        slot, layer = rng.randrange(SLOTS), rng.randrange(LAYERS)
        with self.slots[slot]:
            sequence = self.sequence(slot, create=True)
            begin = sequence.tokens(layer)
            end = min(MAX_TOKENS, begin + rng.choice((1, 1, 1, 7, 64, 300)))
            if begin == end:
                # What was recorded of this life may be gone from here on.
                self.ledger["flushed_tokens"][slot] = 0
                sequence.truncate(rng.randrange(MAX_TOKENS), layer=layer)
                return
            life = int(self.ledger["life"][slot])
            k, v = (rows(slot, life, layer, value, begin, end) for value in (0, 1))
            sequence.append(layer, k, v)
            if rng.random() < 0.02:
                sequence.settle(layer)

    def read(self, rng: random.Random) -> None:
        slot, layer = rng.randrange(SLOTS), rng.randrange(LAYERS)
        before = int(self.ledger["life"][slot])
        sequence = self.held[slot]
        if sequence is None:
            return
        if rng.random() < 0.3:
            sequence.prefetch([layer])
        try:
            k, v = sequence.read(layer)
        except (self.module.ClosedError, self.module.KeyNotFound):
            self.counts["deleted meanwhile"] += 1
            return
        after = int(self.ledger["life"][slot])
        self.check_rows(slot, layer, k, v, range(before - 1, after + 1))

    def check_rows(self, slot: int, layer: int, k: Any, v: Any, lives: range) -> None:
        tokens = k.shape[2]
        self.counts["bytes checked"] += 4 * k.numel()
        if tokens and not any(
            same(k, rows(slot, life, layer, 0, 0, tokens))
            and same(v, rows(slot, life, layer, 1, 0, tokens))
            for life in lives
        ):
            raise Fault(f"sequence {slot}, layer {layer}: bytes that no life of {lives} wrote")

    def delete_sequence(self, rng: random.Random) -> None:
        slot = rng.randrange(SLOTS)
        with self.slots[slot]:
            sequence = self.sequence(slot, create=False)
            if sequence is not None:
                self.ledger["flushed_life"][slot] = 0
                self.held[slot] = None
                sequence.delete()

    def flush(self, rng: random.Random) -> None:
        done = self.ledger["done"].copy()
        slot = rng.randrange(SLOTS)
        with self.slots[slot]:  # nobody deletes or truncates it meanwhile
            sequence = self.held[slot]
            tokens = [sequence.tokens(n) for n in range(LAYERS)] if sequence else None
            self.store.flush()
            self.ledger["flushed"][:] = np.maximum(self.ledger["flushed"], done)
            if tokens is not None:
                self.ledger["flushed_tokens"][slot] = tokens
                self.ledger["flushed_life"][slot] = self.ledger["life"][slot]

    def step(self, rng: random.Random) -> None:
        what = rng.random()
        if what < 0.28:
            kind = rng.choice(("put", "put", "put_many", "put_async", "delete"))
            self.put(rng, kind)
        elif what < 0.62:
            self.get(rng, rng.choice(("get", "get_many", "get_async")))
        elif what < 0.80:
            self.append(rng)
        elif what < 0.95:
            self.read(rng)
        elif what < 0.955:
            self.delete_sequence(rng)
        elif what < 0.97:
            self.flush(rng)
        else:
            stats = self.store.stats()
            self.fill.append(stats["used_nbytes"] / stats["capacity_nbytes"])
            self.store.keys("blob 1")
            self.store.why()

    def interrupt(self, *_: object) -> None:
        """The handler of Ctrl-C: once in each step of the main thread, never between them."""
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt

    def work(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self.stop.is_set():
            try:
                if number == MAIN:
                    self.interruptible = True
                self.step(rng)
                self.counts["steps"] += 1
                if number == MAIN:
                    self.interruptible = False
            except KeyboardInterrupt:
                self.counts["interrupts"] += 1
            except Exception as error:
                self.unexpected(error)

    def unexpected(self, error: Exception) -> None:
        self.counts["faults"] += 1
        if len(self.faults) < FAULTS_SHOWN:
            self.faults.append(f"{type(error).__name__}: {error}")

    def close_ledger(self) -> None:
        """A close is a flush."""
        self.ledger["flushed"][:] = self.ledger["done"]

    def fill_up(self) -> None:
        rng = random.Random(f"{self.seed} fill")
        stats = self.store.stats()
        while stats["used_nbytes"] < FILL * stats["capacity_nbytes"]:
            for _ in range(20):
                self.put(rng, "put")
            stats = self.store.stats()

    # What the last process left.

    def check_all(self) -> None:
        for key in range(KEYS):
            try:
                found = self.store.get(f"blob {key}", as_numpy=True)
            except self.module.KeyNotFound:
                continue
            self.check_blob(key, found, int(self.ledger["flushed"][key]))
            # What was done but not flushed may be gone: from here on this version is the oldest.
            self.ledger["done"][key] = int(found[1])
        there = set(self.store.sequences())
        for slot in range(SLOTS):
            self.check_sequence(slot, f"sequence {slot}" in there)

    def check_sequence(self, slot: int, there: bool) -> None:
        flushed = int(self.ledger["flushed_life"][slot])
        life = int(self.ledger["life"][slot])
        if not there:
            if flushed and flushed == life:
                raise Fault(f"sequence {slot}, which was flushed, is lost")
            return
        sequence = self.sequence(slot, create=False)
        # The process may have died between drawing the number of a life and its creation, or
        # between a delete and its commit.
        lives = range(max(flushed, 0), life + 1)
        for layer in range(LAYERS):
            k, v = sequence.read(layer)
            self.check_rows(slot, layer, k, v, lives)
            if flushed == life and k.shape[2] < self.ledger["flushed_tokens"][slot][layer]:
                raise Fault(f"sequence {slot}, layer {layer}: flushed tokens are lost")
        # Which life it is can't be told from no tokens; the next one begins afresh.
        self.ledger["flushed_life"][slot] = 0
        self.held[slot] = None
        sequence.delete()


def _resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _run_life(folder: Path, engine: str | None, seed: int) -> None:
    """The child: ready when the store is open and checked, a report when it was stopped."""
    began = time.monotonic()
    life = Life(folder, engine, seed)
    life.check_all()
    life.fill_up()
    signal.signal(signal.SIGTERM, lambda *_: life.stop.set())
    signal.signal(signal.SIGINT, life.interrupt)
    print("ready", flush=True)
    threads = [threading.Thread(target=life.work, args=(n,)) for n in range(1, THREADS)]
    samples: list[tuple[float, int, int]] = []

    def sample() -> None:
        while not life.stop.wait(SAMPLE_S):
            fds = len(os.listdir("/proc/self/fd"))
            samples.append((time.monotonic() - began, _resident_nbytes(), fds))

    threads.append(threading.Thread(target=sample))
    for thread in threads:
        thread.start()
    life.work(MAIN)
    for thread in threads:
        thread.join()
    life.store.close()
    life.close_ledger()
    report = {
        "counts": dict(life.counts),
        "faults": life.faults,
        "fill": life.fill,
        "samples": samples,
    }
    print(json.dumps(report), flush=True)


# -- the one that starts and stops them ------------------------------------------------------------


def _growth(samples: list[list[float]]) -> tuple[int, int] | None:
    """Bytes and descriptors held more at the end than after the warm-up; None: too short."""
    warm = [sample for sample in samples if sample[0] > WARM_UP_S]
    if len(warm) < 20:
        return None
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    return tuple(  # type: ignore[return-value]
        int(median(s[n] for s in last) - median(s[n] for s in first)) for n in (1, 2)
    )


def _one_life(
    folder: Path, arguments: argparse.Namespace, rng: random.Random, seed: int
) -> dict[str, Any]:
    how = rng.choices(("kill", "stop", "interrupts"), (0.4, 0.2, 0.4))[0]
    seconds = rng.uniform(1, 15) if how == "kill" else rng.uniform(30, 120)
    command = [sys.executable, __file__, "--life", str(folder), "--seed", str(seed)]
    if arguments.engine:
        command += ["--engine", arguments.engine]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline()
    if said != "ready\n":
        return {"how": how, "faults": [f"no life: exit status {child.wait()}"], "counts": {}}
    until = time.monotonic() + min(seconds, max(1.0, arguments.until - time.monotonic()))
    while time.monotonic() < until and child.poll() is None:
        if how == "interrupts":
            time.sleep(rng.expovariate(5))
            child.send_signal(signal.SIGINT)
        else:
            time.sleep(0.05)
    child.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
    try:
        rest = child.communicate(timeout=CLOSE_S * 2)[0]
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)
        child.communicate()
        return {"how": how, "faults": ["it does not stop"], "counts": {}}
    if how == "kill":
        return {"how": how, "faults": [], "counts": {"kills": 1}}
    if child.returncode:
        return {"how": how, "faults": [f"exit status {child.returncode}"], "counts": {}}
    report = json.loads(rest.splitlines()[-1])
    growth = _growth(report.pop("samples"))
    if growth and growth[0] > GROWTH_NBYTES:
        report["faults"].append(f"memory grew by {growth[0] / MIB:.0f} MiB")
    if growth and growth[1] > GROWTH_FDS:
        report["faults"].append(f"{growth[1]} descriptors more")
    fill = report.pop("fill")
    report |= {"how": how, "growth": growth, "fill": median(fill) if fill else None}
    return dict(report)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a folder on the drive; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--life", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life:
        _run_life(arguments.life, arguments.engine, arguments.seed)
        return 0
    arguments.until = time.monotonic() + 60 * arguments.minutes
    rng = random.Random(arguments.seed)
    total: Counter[str] = Counter()
    lives: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="spdk_kv-soak-", dir=arguments.dir) as name:
        folder = Path(name)
        Ledger(folder / "ledger", create=True)
        while time.monotonic() < arguments.until:
            life = _one_life(folder, arguments, rng, arguments.seed * 10_000 + len(lives))
            lives.append(life)
            total.update(life["counts"])
            grew = life.get("growth")
            print(
                f"{len(lives):4} {life['how']:10} steps {life['counts'].get('steps', 0):8,}"
                + (f"  fill {life['fill']:.3f}" if life.get("fill") else "")
                + (f"  memory {grew[0] / MIB:+.0f} MiB, descriptors {grew[1]:+}" if grew else "")
                + "".join(f"\n     FAULT {fault}" for fault in life["faults"]),
                flush=True,
            )
    faults = [fault for life in lives for fault in life["faults"]]
    print("\n| what | count |\n|---|---|")
    for what, count in sorted(total.items()):
        print(f"| {what} | {count:,} |")
    print(f"| lives | {len(lives):,} |\n| faults | {len(faults):,} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"counts": total, "lives": lives}, indent=1) + "\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
