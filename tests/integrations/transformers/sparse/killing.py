"""Kills a process in each stage of a chat that reads a part, and goes on from what is left; run by
the tests.

    python killing.py FOLDER

The parent makes the model once and opens no store; every child is forked from it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from transformers import DynamicCache

from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import model_of
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.integrations.transformers.sparse.stream import SparseStream
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store

TEXT = prompt(1, 140, 7)["input_ids"]
STAGES = ("prefill", "decode", "before the flush puts", "after the flush put", "after the flush")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(owner: Any, name: str, calls: int, *, after: bool = False) -> None:
    """The call number ``calls`` of the method, counted from 0, is the last."""
    method: Callable[..., Any] = getattr(owner, name)
    left = [calls]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1 and not after:
            die()
        found = method(*args, **kwargs)
        if left[0] == -1:
            die()
        return found

    setattr(owner, name, counted)


def cache_of(store: KVStore, model: Any) -> SparseKVCache:
    return SparseKVCache(store, model, name="chat", input_ids=TEXT, tokens=512)


def child(folder: str, stage: str) -> None:
    """A turn that comes to its end, and one that does not."""
    model = model_of("Llama")
    store = open_store(f"file://{folder}/kv", capacity="64 MiB", flush_interval_s=None)
    with cache_of(store, model) as cache, torch.no_grad():
        model(TEXT[:, cache.saved_tokens : 100], **{CACHE_ARGUMENT: cache})
    store.flush()
    cache = cache_of(store, model)
    if stage == "prefill":
        dying(SparseStream, "_attended", 2, after=True)
    elif stage == "decode":
        dying(SparseStream, "_attended", 4 + 6)
    elif stage == "before the flush puts":
        dying(KVStore, "put", 0)
    elif stage == "after the flush put":
        dying(KVStore, "put", 0, after=True)
    with torch.no_grad():
        model(TEXT[:, 100:138], **{CACHE_ARGUMENT: cache})
        for token in (138, 139):
            model(TEXT[:, token : token + 1], **{CACHE_ARGUMENT: cache})
        store.flush()
    die()


def check(folder: str, stage: str) -> None:
    model = model_of("Llama")
    text = torch.cat([TEXT, prompt(1, 3, 99)["input_ids"]], dim=1)
    with open_store(f"file://{folder}/kv") as store:
        cache = SparseKVCache(store, model, name="chat", input_ids=text, tokens=512)
        saved = 140 if stage == "after the flush" else 100
        assert cache.saved_tokens == saved, (stage, cache.saved_tokens)
        assert cache.stats()["metadata_nbytes"] > 0, stage
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        found = generate(model, cache, inputs).sequences
        assert torch.equal(found, generate(model, DynamicCache(), inputs).sequences), stage
        store.sequence("chat").delete()


def in_child(folder: str, stage: str, what: Callable[[str, str], None]) -> int:
    pid = os.fork()
    if not pid:
        try:
            what(folder, stage)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    model_of("Llama")
    for stage in STAGES:
        assert in_child(folder, stage, child) == signal.SIGKILL, stage
        assert in_child(folder, stage, check) == 0, stage
    print(f"killed {len(STAGES)} times")


if __name__ == "__main__":
    main(sys.argv[1])
