"""What a token costs a whole model whose K and V are long: SmolLM2-135M's shape, random weights.

K and V are random as well, put into each cache without a prompt. Every cache then decodes the same
few tokens: all of K and V in memory (DynamicCache), all of it from the drive, and a part of it.
What such a model asks for at one step has nothing to do with what it asked for before, so that
nearly all of a part is read: a real model reads a fourth of that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import spdk_kv
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache, SparseKVCache
from spdk_kv.sparse import Selector

_SLICE = 2048  # tokens that are appended at once


@dataclass(frozen=True)
class Plan:
    """``selected``: what a part is. ``steps``: decoded by each cache, after ``warm`` others."""

    tokens: int = 32768
    selected: int = 400
    warm: int = 3
    steps: int = 12

    @property
    def method(self) -> str:
        """In words."""
        return (
            f"30 layers, 9 query and 3 KV heads of 64, random weights and K and V in float32, "
            f"{self.tokens} tokens, {self.selected} selected, {torch.get_num_threads()} threads. "
            f"Medians of {self.steps} steps."
        )


def model_of(tokens: int) -> Any:
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=tokens + 4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Timed:
    """Seconds that selecting takes, within the block."""

    def __enter__(self) -> Timed:
        self.seconds = 0.0
        self._select = select = Selector.select

        def timed(selector: Selector, *arguments: Any, **how: Any) -> Any:
            begin = time.perf_counter()
            try:
                return select(selector, *arguments, **how)
            finally:
                self.seconds += time.perf_counter() - begin

        Selector.select = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Selector.select = self._select  # type: ignore[method-assign]


def measured(plan: Plan, folder: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each cache."""
    model = model_of(plan.tokens)
    made = torch.Generator().manual_seed(1)
    kv = [torch.randn(1, 3, plan.tokens, 64, generator=made) for _ in range(2)]
    whole_nbytes = 30 * 2 * kv[0].nbytes
    rows = []
    with spdk_kv.open(f"file://{folder}/kv", capacity=3 * whole_nbytes) as store:
        memory = ("dense in memory", lambda: DynamicCache(config=model.config))
        drive = ("all from the drive", lambda: OffloadedKVCache(store, model))
        part = ("a part", lambda: SparseKVCache(store, model, tokens=plan.selected))
        for name, make in (memory, drive, part):
            cache = make()
            for first in range(0, plan.tokens, _SLICE):
                for layer in range(30):
                    cache.update(*(one[:, :, first : first + _SLICE] for one in kv), layer)
            rows.append(_row(name, model, cache, plan, whole_nbytes))
            report(
                f"  {name:20} {1e3 * rows[-1]['step_s']:.1f} ms a token, of which selecting "
                f"{1e3 * rows[-1]['select_s']:.1f} ms"
            )
            if name != memory[0]:
                cache.close()
            del cache
    return rows


def _row(name: str, model: Any, cache: Any, plan: Plan, whole_nbytes: int) -> dict[str, Any]:
    random = np.random.default_rng(2)
    seconds, selecting = [], []
    told: dict[str, Any] = {}
    for step in range(plan.warm + plan.steps):
        if step == plan.warm and hasattr(cache, "stats"):
            told = cache.stats()
        token = torch.tensor([[int(random.integers(49152))]])
        with torch.inference_mode(), Timed() as select:
            begin = time.perf_counter()
            model(token, **{CACHE_ARGUMENT: cache})
            seconds.append(time.perf_counter() - begin)
        selecting.append(select.seconds)
    now = cache.stats() if hasattr(cache, "stats") else {}
    held = now.get("resident_nbytes", 0) + now.get("metadata_nbytes", 0)
    return {
        "part": "step",
        "variant": name,
        "tokens": plan.tokens,
        "step_s": statistics.median(seconds[plan.warm :]),
        "lowest_step_s": min(seconds[plan.warm :]),
        "highest_step_s": max(seconds[plan.warm :]),
        "select_s": statistics.median(selecting[plan.warm :]),
        "read_nbytes_per_token": (now.get("read_nbytes", 0) - told.get("read_nbytes", 0))
        / plan.steps,
        # All from the drive is in staging memory and page cache, as far as there is room.
        "memory_nbytes": held or (None if hasattr(cache, "stats") else whole_nbytes),
    }
