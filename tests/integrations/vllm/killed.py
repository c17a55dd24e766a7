"""Kills an engine's offloading in the middle of stores, over and over; run as a program.

    python killed.py FOLDER CYCLES

The parent imports vLLM once and opens no store. Every child loads what the one before it left,
stores more, and is killed. Prints how many blocks were found exact, and how many children died.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import vllm.v1.kv_offload.tiering.spec  # noqa: F401

from integrations.vllm.host import blocks, host, key_of, tier_at
from support.waiting import wait_until

BATCH = 8
# Numbers of blocks that are used again and again.
BLOCKS = 64


def child(folder: str, shared: np.ndarray, seed: int) -> None:
    choose = random.Random(seed)
    with host(tier_at(folder, capacity="16 MiB", flush_interval_s=0.02)) as running:
        name_of = [running.tier._keys(key_of(number)) for number in range(BLOCKS)].__getitem__
        durable = [number for number in range(BLOCKS) if shared[10 + number]]
        for first in range(0, BLOCKS, BATCH):
            wanted = blocks(range(first, first + BATCH))
            loaded = running.load(list(wanted))
            for key, found in zip(wanted, loaded, strict=True):
                assert found in (None, wanted[key]), "other bytes"
                shared[1] += found is not None
            for number, found in zip(range(first, first + BATCH), loaded, strict=True):
                assert found is not None or number not in durable, f"{number} was durable"
            running.forget_memory()
        while True:
            running.store(blocks(choose.sample(range(BLOCKS), BATCH)))
            running.forget_memory()
            # Now and then what cannot be lost any more.
            if not choose.randrange(4):
                held = [
                    n for n in range(BLOCKS) if running.tier._keys(key_of(n)) in running.tier.store
                ]
                running.tier.store.flush()
                for number in held:
                    shared[10 + number] = 1
            shared[0] += 1
            # Stored again: a block is forgotten, and written to another place.
            number = choose.randrange(BLOCKS)
            shared[10 + number] = 0
            running.tier.store.delete(name_of(number))


def main(folder: str, cycles: int) -> None:
    shared = np.frombuffer(mmap.mmap(-1, 4096), np.int64)
    killed = 0
    for cycle in range(cycles):
        before = int(shared[0])
        pid = os.fork()
        if not pid:
            try:
                child(folder, shared, cycle)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        ended = []

        def is_over(pid: int = pid, ended: list[int] = ended) -> bool:
            ended.append(os.waitpid(pid, os.WNOHANG)[0])
            return bool(ended[-1])

        wanted = before + 1 + cycle % 7
        wait_until(lambda wanted=wanted, is_over=is_over: shared[0] >= wanted or is_over())
        if ended[-1]:
            sys.exit("a child failed")
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(int(shared[1]), killed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
