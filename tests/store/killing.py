"""Kills a store's process at random moments, over and over; run as a program by the tests.

    python killing.py FOLDER CYCLES SEED (blobs|sequences|forks|evicted|space)

The parent imports torch once and opens no store; every child opens the store, checks what the one
before it left, goes on changing it, and is killed. What a child was about to do and what it knows
to be durable, it says in memory shared with the parent, which survives it.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import spdk_kv
from sequence import forks_killed
from spdk_kv.errors import CapacityError, ClosedError, KeyNotFound
from spdk_kv.index import summary
from spdk_kv.placement import lock
from spdk_kv.store import trimming
from store.helpers import FILE_ENGINES, open_store, payload, version_of
from support.waiting import PATIENCE_S

summary.LEAST_BLOBS = 0  # these stores are small

KEYS = [f"key {i}" for i in range(8)]
SHAPE = spdk_kv.KVShape(2, 2, 40, torch.float16, 400, batch=3)
# Every seventh version of a key is its deletion.
DELETED = 7


class Shared:
    """What outlives a killed child. All int64, so that no value is ever half written."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 1 << 16)
        words = np.frombuffer(memory, np.int64)
        self.started, self.durable = words[0:8], words[8:16]
        # opened, checked, puts, flushes, appends, what moved or was given back
        self.counts = words[16:24]
        # Of the sequence: the epoch of each token, the count of tokens ahead of them.
        self.committed, self.candidate = words[1000:1402], words[2000:2402]
        self.epoch = words[3000:3001]
        # Of forks: which were durable, and which were deleted since.
        self.forks_durable, self.forks_deleted = words[3100:3148], words[3200:3248]


# -- blobs ----------------------------------------------------------------------------------------


def size_of(version: int) -> int:
    return 16 + version * 7919 % 90_000


def check_blobs(store: spdk_kv.KVStore, shared: Shared) -> list[int]:
    """The versions that are there: of each key one that was durable, or begun later."""
    found = []
    for number, key in enumerate(KEYS):
        oldest, newest = int(shared.durable[number]), int(shared.started[number])
        try:
            version = version_of(key, store.get(key, as_numpy=True))
        except KeyNotFound:
            version = newest // DELETED * DELETED  # the newest deletion; 0: never put
            assert version >= oldest, f"{key}: version {oldest} was durable and is lost"
        else:
            assert oldest <= version <= newest, f"{key}: {version} not in [{oldest}, {newest}]"
            assert version % DELETED, f"{key}: a deletion came back as a value"
        found.append(version)
    return found


def change_blobs(
    store: spdk_kv.KVStore, shared: Shared, rng: random.Random, there: list[int]
) -> None:
    for _ in range(rng.randrange(1, 12)):
        several = {}
        for number in rng.sample(range(len(KEYS)), rng.choice([1, 1, 3])):
            version = int(shared.started[number]) + 1
            shared.started[number] = there[number] = version
            if version % DELETED:
                several[KEYS[number]] = payload(KEYS[number], version, size_of(version))
            else:
                store.delete(KEYS[number])
        store.put_many(several)
        shared.counts[2] += len(several)
    store.flush()
    shared.durable[:] = there
    shared.counts[3] += 1


def give_back(store: spdk_kv.KVStore, shared: Shared) -> None:
    """Compacts and trims in a thread, all the time."""
    trimming.TICK_S = 0.001
    trimming.LEAST_NBYTES = trimming._LEAST_WHILE_BUSY_NBYTES = 4096

    def run() -> None:
        try:
            while True:
                before = [blob.offset for blob in list(store.catalog.records.blobs.values())]
                store.compact()
                after = [blob.offset for blob in list(store.catalog.records.blobs.values())]
                shared.counts[5] += before != after
                store.trim()
        except ClosedError:
            pass
        except BaseException:
            shared.counts[7] = 1
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)

    threading.Thread(target=run, daemon=True).start()


# -- a sequence -----------------------------------------------------------------------------------


def tokens_of(layer: int, first: int, epochs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens that were appended in these epochs."""
    rows = [
        np.random.default_rng([layer, first + i, int(epoch)]).standard_normal((2, 3, 2, 40))
        for i, epoch in enumerate(epochs)
    ]
    both = np.stack(rows, axis=3) if rows else np.empty((2, 3, 2, 0, 40))
    k, v = torch.from_numpy(both).to(torch.float16)
    return k, v


def is_state(sequence: spdk_kv.Sequence, state: np.ndarray) -> bool:
    count = int(state[0])
    for layer in range(SHAPE.layers):
        if sequence.tokens(layer) != count:
            return False
        wanted = tokens_of(layer, 0, state[1 : 1 + count])
        if not all(map(torch.equal, sequence.read(layer), wanted)):
            return False
    return True


def check_sequence(store: spdk_kv.KVStore, shared: Shared) -> spdk_kv.Sequence:
    sequence = store.sequence("q", SHAPE)
    for state in (shared.candidate, shared.committed):
        if is_state(sequence, state):
            shared.committed[:] = shared.candidate[:] = state
            return sequence
    raise AssertionError(
        f"{sequence.tokens(0)} and {sequence.tokens(1)} tokens are neither what was durable "
        f"({shared.committed[0]}) nor what was about to be ({shared.candidate[0]})"
    )


def change_sequence(sequence: spdk_kv.Sequence, shared: Shared, rng: random.Random) -> None:
    state = shared.committed.copy()
    for _ in range(rng.randrange(1, 6)):
        count = int(state[0])
        if rng.random() < 0.35 or count > 300:
            keep = rng.randrange(count + 1)
            state[0] = keep
            # What the last record covers is only cut off by a newer record, at once.
            recorded = keep < shared.committed[0]
            if recorded:
                shared.candidate[:] = state
            sequence.truncate(keep)
            if recorded:
                shared.committed[:] = state
            shared.epoch += 1
        else:
            more = rng.choice([1, 1, 2, 30, 80])
            state[1 + count : 1 + count + more] = shared.epoch[0]
            for layer in range(SHAPE.layers):
                sequence.append(layer, *tokens_of(layer, count, state[1 + count :][:more]))
            state[0] += more
            shared.counts[4] += more
    shared.candidate[:] = state


# -- processes ------------------------------------------------------------------------------------


STAGES = OPENED, CHECKED, CHANGED, MOVED = range(4)


def reached(shared: Shared, stage: int) -> int:
    """How often children got as far as ``stage``, from CHANGED on in puts and tokens, and moves."""
    counts = shared.counts
    return int((counts[0], counts[1], counts[2] + counts[4], counts[5])[stage])


def plan(cycles: int, what: str, rng: random.Random) -> list[int | None]:
    """Which stage each child reaches before it is killed; None: whichever it comes to.

    The first one changes something, and of the others there are as many of each sort.
    """
    stages = [*(STAGES if what == "space" else STAGES[:MOVED]), None]
    others = [stages[number % len(stages)] for number in range(cycles - 1)]
    rng.shuffle(others)
    return [CHANGED, *others]


def wait_for(stage: int, shared: Shared, before: int, pid: int) -> bool:
    """Whether the child came to ``stage``; or it has ended, which its status tells."""
    deadline = time.monotonic() + PATIENCE_S
    while reached(shared, stage) == before:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def child(folder: Path, shared: Shared, seed: int, what: str, engine: str, last: bool) -> None:
    rng = random.Random(seed)
    # Small, so that space is reused all the time.
    eviction = "lru" if what == "evicted" else "none"
    store = open_store(folder, capacity="4 MiB", engine=engine, eviction=eviction)
    if what == "evicted":
        live_with_evictions(store, shared, rng, last)
        return
    shared.counts[0] += 1
    there = check_blobs(store, shared)
    sequence = check_sequence(store, shared) if what == "sequences" else None
    forks = shared.forks_durable, shared.forks_deleted
    if what == "forks":
        forks_killed.check_all(store, *forks)
    if what == "space":
        give_back(store, shared)
    shared.counts[1] += 1
    if last:
        store.close()
        return
    while True:
        if sequence is not None:
            change_sequence(sequence, shared, rng)
        if what == "forks":
            forks_killed.change(store, *forks, shared.epoch, rng)
        change_blobs(store, shared, rng, there)
        if what == "forks":
            forks_killed.flushed(store, shared.forks_durable)
        shared.committed[:] = shared.candidate


def live_with_evictions(
    store: spdk_kv.KVStore, shared: Shared, rng: random.Random, last: bool
) -> None:
    """Blobs and sequences that come, go and make room for each other; none has other bytes."""
    shared.counts[0] += 1
    forks_killed.check_all(store, *(np.zeros(forks_killed.MOST, np.int64),) * 2)
    keys = store.keys()
    for key in keys:
        version_of(key, store.get(key, as_numpy=True))
    shared.counts[1] += 1
    unused = np.zeros(forks_killed.MOST, np.int64)
    while not last:
        forks_killed.change(store, unused, unused, shared.epoch, rng)
        key = rng.choice(KEYS)
        with suppress(CapacityError):  # of sequences that are in use
            store.put(key, payload(key, rng.randrange(100), rng.randrange(16, 500_000)))
        shared.counts[2] += 1
        if rng.random() < 0.1:
            store.compact()
            shared.counts[5] += 1
        if rng.random() < 0.3:
            store.flush()
            shared.counts[3] += 1
    store.close()


def main() -> int:
    folder, cycles, seed, what = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    # What was killed may hold the store until its last command ends, however busy the disk.
    lock._COMMANDS_TIMEOUT_S = 60
    shared, rng, killed = Shared(), random.Random(seed), 0
    for cycle, stage in enumerate([*plan(cycles, what, rng), None]):
        last = cycle == cycles
        engine = FILE_ENGINES[cycle % len(FILE_ENGINES)]
        before = 0 if stage is None else reached(shared, stage)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                child(folder, shared, seed * 100_003 + cycle, what, engine, last)
                status = 0
            except BaseException:
                shared.counts[7] = 1  # whatever else comes: it may be killed before it exits
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        if not last:
            came = stage is None or wait_for(stage, shared, before, pid)
            time.sleep(rng.random() * 0.06)
            os.kill(pid, signal.SIGKILL)
            if not came:
                print(f"cycle {cycle} with {engine} never came to stage {stage}", file=sys.stderr)
                return 1
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and not last and not shared.counts[7]:
            killed += 1
        elif status or not last:
            print(f"cycle {cycle} with {engine} ended with status {status}", file=sys.stderr)
            return 1
    names = ("opened", "checked", "puts", "flushes", "appends", "moves")
    counts = {name: int(count) for name, count in zip(names, shared.counts, strict=False)}
    print(json.dumps({"killed": killed, **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
