"""Kills a process that saves prompts and goes on in a chat, over and over; run by the tests.

    python killing.py FOLDER CYCLES SEED

The parent makes the model once and opens no store. Every child checks what the one before it left,
goes on, and is killed. What is durable it says in memory shared with the parent, which survives it.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import DynamicCache

from integrations.transformers.models import generate, model_of, prompt
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache, PromptCache
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store

# How many of the durable prompts are looked at after each kill.
LOOKED_AT = 4
CHAT = prompt(1, 120, 7)["input_ids"]


class Shared:
    """What outlives a killed child: children that are ready, prompts begun, which are durable."""

    def __init__(self) -> None:
        self.words = np.frombuffer(mmap.mmap(-1, 4096), np.int64)
        self.marks = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)

    def __getattr__(self, name: str) -> int:
        return int(self.words[("ready", "begun").index(name)])

    def set(self, name: str, value: int) -> None:
        self.words[("ready", "begun").index(name)] = value

    @property
    def durable(self) -> list[int]:
        """Not all that were begun: the one that a kill came amid never will be."""
        return [int(number) for number in np.flatnonzero(self.marks)]


def text_of(number: int) -> torch.Tensor:
    """Every other one goes on from the one before it."""
    base = prompt(1, 40 + number % 23, 100 + number // 2)["input_ids"]
    return torch.cat([base, prompt(1, 30, number)["input_ids"]], 1) if number % 2 else base


def answer(model: Any, cache: Any, text: torch.Tensor) -> list[list[int]]:
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    tokens: list[list[int]] = generate(model, cache, inputs, max_new_tokens=4).sequences.tolist()
    return tokens


def check(store: KVStore, prompts: PromptCache, model: Any, shared: Shared) -> None:
    durable = random.sample(shared.durable, min(LOOKED_AT, len(shared.durable)))
    begun = {shared.begun - 1} if shared.begun else set()
    for number in (*durable, *begun.difference(durable)):
        text = torch.cat([text_of(number), prompt(1, 3, 99)["input_ids"]], 1)
        with prompts.open(text) as cache:
            assert number not in durable or cache.saved_tokens >= text.shape[1] - 3, number
            found = answer(model, cache, text)
        assert found == answer(model, DynamicCache(config=model.config), text), number
    for stored in prompts.list():
        # Nothing is listed that is not there.
        assert store.sequence(stored.name).tokens() >= stored.tokens or stored.name == "chat"
    go_on(store, model)


def go_on(store: KVStore, model: Any) -> None:
    """Another turn of a chat, from somewhere within the last one."""
    text = torch.cat([CHAT[:, : random.randrange(1, 120)], torch.randint(2, 90, (1, 5))], 1)
    with OffloadedKVCache(store, model, name="chat", input_ids=text) as cache:
        found = answer(model, cache, text)
    assert found == answer(model, DynamicCache(config=model.config), text)


def child(folder: str, seed: int, shared: Shared) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    model = model_of("llama")
    store = open_store(f"file://{folder}/kv", capacity="1 GiB", flush_interval_s=0.05)
    prompts = PromptCache(store, model)
    check(store, prompts, model, shared)
    shared.set("ready", shared.ready + 1)
    saved: list[int] = []
    while True:
        number = shared.begun
        shared.set("begun", number + 1)
        text = text_of(number)
        with prompts.open(text) as cache, torch.no_grad():
            model(text[:, cache.saved_tokens :], **{CACHE_ARGUMENT: cache})
            if cache.get_seq_length() == text.shape[1]:
                prompts.save(cache)
                saved.append(number)
        if random.random() < 0.5:
            store.flush()
            shared.marks[saved] = 1
            saved.clear()
        go_on(store, model)


def main(folder: str, cycles: int, seed: int) -> None:
    torch.set_num_threads(1)
    model_of("llama")
    shared, rng = Shared(), random.Random(seed)
    for cycle in range(cycles):
        pid = os.fork()
        if not pid:
            try:
                child(folder, seed + cycle, shared)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
        ended = 0
        while shared.ready <= cycle and not ended:
            time.sleep(0.005)
            ended, _ = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"the child of cycle {cycle} failed"
        time.sleep(rng.uniform(0, 1.0))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(f"{cycles} kills, {shared.begun} prompts begun, {len(shared.durable)} durable")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
