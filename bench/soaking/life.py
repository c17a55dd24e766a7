"""One process on the store: it checks what the last one left, then works until it is stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from soaking.ledger import (
    DIM,
    HEADS,
    KEYS,
    LAYERS,
    MAX_TOKENS,
    SLOTS,
    Fault,
    Ledger,
    blob_bytes,
    rows,
    same,
)

CAPACITY_NBYTES = 512 << 20
FILL = 0.95  # of the capacity, when a life begins
THREADS, MAIN = 8, 0
SAMPLE_S = 1.0
CLOSE_S = 60.0
FAULTS_SHOWN = 5  # of a process


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


def run_life(folder: Path, engine: str | None, seed: int) -> None:
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
