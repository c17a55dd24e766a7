"""How fast a decode step is whose K and V come from a drive, by the way in which they come.

The shape of an 8B model's attention, filled with random K and V, and queries that drift as far from
one step to the next as makes a pool of twice the selection miss what it misses on a real model's
trace. No model is run: a layer takes the time of its attention on this CPU ("real"), or, as on an
accelerator, a wait in which the CPU is free ("emulated").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ways import SHAPE_8B, FromMemory, FullFromDrive, Pair, Part, PartFromMemory, Shape, Way

import spdk_kv
from spdk_kv.sparse import Pool, Selector, Settings, preset
from throttle import throttled

DRIVES: dict[str, int | None] = {"eMMC": 250_000_000, "NVMe": 1_800_000_000, "unthrottled": None}
_SLICE = 1024  # tokens that are appended at once


@dataclass(frozen=True)
class Plan:
    """``compute_ms``: of one step, where it is emulated. ``misses``: the share of the selection
    that a pool of twice its size misses. ``kvswap_tokens``: the selections of faithful KVSwap.
    ``part``: of the report."""

    shape: Shape = SHAPE_8B
    tokens: int = 32768
    selected: int = 400
    kvswap_tokens: Sequence[int] = (400,)
    batches: Sequence[int] = (1,)
    drives: Sequence[str] = tuple(DRIVES)
    computes: Sequence[str] = ("emulated", "real")
    compute_ms: float = 80.0
    misses: float = 0.31
    steps: int = 6
    rounds: int = 3
    part: str = "speed"

    @property
    def method(self) -> str:
        """In words."""
        shape = self.shape
        return (
            f"{shape.layers} layers, {shape.heads} query and {shape.kv_heads} KV heads of "
            f"{shape.head_dim}, {self.tokens} tokens of random K and V in bfloat16, "
            f"{self.selected} selected; emulated compute is a wait of {self.compute_ms:g} ms a "
            f"step, real compute the attention on this CPU. Queries drift so that a pool of twice "
            f"the selection misses {self.misses:.0%}. The page cache is not used. Medians of steps."
        )


# Less of the shape, so that the largest batch fits beside what it is compared with.
BATCHES = Plan(
    shape=replace(SHAPE_8B, layers=4),
    tokens=8192,
    batches=(1, 4, 16),
    computes=("emulated",),
    compute_ms=10.0,
    part="batches",
)


class Queries:
    """``[batch, heads, head_dim]`` of every layer, which drift from step to step."""

    def __init__(self, shape: Shape, batch: int, drift: float, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._drift = drift
        self._size = (shape.layers, batch, shape.heads, shape.head_dim)
        self._now = self._new()

    def _new(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self._random.standard_normal(self._size, dtype=np.float32)

    def step(self) -> torch.Tensor:
        """Those of the next step, ``[layers, batch, heads, head_dim]``."""
        kept = (1 - self._drift**2) ** 0.5
        self._now = kept * self._now + self._drift * self._new()
        return torch.from_numpy(self._now)


def keys_of(shape: Shape, batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random K, or V, of one layer: ``[batch, kv_heads, tokens, head_dim]``."""
    made = torch.Generator().manual_seed(seed)
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    return torch.randn(size, generator=made).to(torch.bfloat16)


def drift_for(plan: Plan, k: torch.Tensor) -> float:
    """The drift at which a pool of twice the selection misses the share that is planned."""
    settings = preset("codes", tokens=plan.selected)
    selector = Selector(settings)
    selector.append(k[:1])
    whole = settings.whole_groups(k.shape[2])
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        shape = Shape(1, plan.shape.heads, plan.shape.kv_heads, plan.shape.head_dim)
        queries, pool = Queries(shape, 1, middle), Pool(1, settings.slots)
        for step in range(16):
            if step == 4:  # full by then
                pool.hits = pool.misses = 0
            pool.take(0, selector.select(queries.step()[0], whole_groups=whole)[0])
        if pool.misses / (pool.hits + pool.misses) < plan.misses:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def filled(
    store: spdk_kv.KVStore, name: str, granularity: Any, shape: Shape, k: torch.Tensor
) -> spdk_kv.Sequence:
    """A sequence that has ``k`` as K and V of every layer, on the drive."""
    sequence = store.sequence(name, shape.cached(len(k)), granularity=granularity, temporary=True)
    for layer in range(shape.layers):
        for first in range(0, k.shape[2], _SLICE):
            part = k[:, :, first : first + _SLICE]
            sequence.append(layer, part, part)
    for layer in range(shape.layers):
        sequence.settle(layer)
    return sequence


def ways_of(
    plan: Plan, store: spdk_kv.KVStore, batch: int, k: torch.Tensor
) -> Iterator[tuple[Way, Callable[[], None]]]:
    """Every way with its data in place, and what gives that back."""
    shape = plan.shape
    whole = filled(store, "whole", "layer", shape, k)
    yield FullFromDrive(whole), whole.delete
    grouped = filled(store, "grouped", "token", shape, k)
    variants = [("codes", preset("codes", tokens=plan.selected))]
    variants += [(f"kvswap {n}", preset("kvswap", tokens=n)) for n in plan.kvswap_tokens]
    for name, settings in variants:
        yield Part(name, grouped, shape, settings, selectors(settings, shape, k)), lambda: None
    grouped.delete()
    layers: list[Pair] = [(k.clone(), k.clone()) for _ in range(shape.layers)]
    yield FromMemory(layers), lambda: None
    settings = preset("codes", tokens=plan.selected)
    made = selectors(settings, shape, k)
    yield PartFromMemory("codes in memory", layers, settings, made), layers.clear


def selectors(settings: Settings, shape: Shape, k: torch.Tensor) -> list[Selector]:
    """One for each layer, which knows ``k``."""
    first = Selector(settings)
    first.append(k)
    return [first, *(first.copy() for _ in range(shape.layers - 1))]


class Decoding:
    """Decode steps of one way."""

    def __init__(self, plan: Plan, way: Way, queries: Queries, batch: int) -> None:
        self._plan = plan
        self._way = way
        self._queries = queries
        shape = plan.shape
        self._new = torch.randn(batch, shape.kv_heads, 1, shape.head_dim).to(torch.bfloat16)

    def step(self, compute: str) -> float:
        """Its seconds."""
        way, layers = self._way, self._plan.shape.layers
        queries = self._queries.step()
        began = time.perf_counter()
        way.ask(0, queries[0])
        for layer in range(layers):
            if layer + 1 < layers:
                way.ask(layer + 1, queries[layer + 1])
            k, v = way.attended(layer, self._new, self._new)
            if compute == "real":
                # The query heads of a KV head as so many tokens: K and V are read once for all.
                query = queries[layer].unflatten(1, (k.shape[1], -1)).to(k.dtype)
                torch.nn.functional.scaled_dot_product_attention(query, k, v)
            else:
                time.sleep(self._plan.compute_ms / 1e3 / layers)
        return time.perf_counter() - began


def measured(plan: Plan, folder: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of every way, drive, batch and kind of compute."""
    rows = []
    with throttled(folder) as throttle:
        for batch in plan.batches:
            k = keys_of(plan.shape, batch, plan.tokens)
            drift = drift_for(plan, k)
            report(f"batch {batch}: queries drift by {drift:.3f} a step")
            nbytes = 2 * plan.shape.token_nbytes * batch * (plan.tokens + 4096) + (1 << 30)
            # Nothing of it comes from memory that happens to be free.
            direct = spdk_kv.PageCacheOptions(policy="direct")
            where = f"file://{folder}/kv"
            with spdk_kv.open(where, capacity=nbytes, page_cache=direct) as store:
                for way, end in ways_of(plan, store, batch, k):
                    rows += _of_way(plan, way, batch, drift, throttle, report)
                    end()
    return rows


def _of_way(
    plan: Plan, way: Way, batch: int, drift: float, throttle: Any, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    decoding = Decoding(plan, way, Queries(plan.shape, batch, drift), batch)
    rows = []
    is_full = isinstance(way, FullFromDrive)
    for _ in range(1 if is_full else 4):
        decoding.step("real")  # the pool fills
    reads = isinstance(way, FullFromDrive | Part)
    for drive in plan.drives if reads else ("memory",):
        throttle.limit(DRIVES.get(drive))
        for compute in plan.computes:
            before, seconds = way.read_nbytes, []
            steps = max(2, plan.steps // 3) if is_full else plan.steps * plan.rounds
            for _ in range(steps):
                seconds.append(decoding.step(compute))
            median = statistics.median(seconds)
            row = {
                "part": plan.part,
                "variant": way.name,
                "drive": drive,
                "compute": compute,
                "tokens": plan.tokens,
                "batch": batch,
                "tokens_per_s": batch / median,
                "lowest_tokens_per_s": batch / max(seconds),
                "highest_tokens_per_s": batch / min(seconds),
                "read_nbytes_per_token": (way.read_nbytes - before) / steps / batch,
                "memory_nbytes": way.memory_nbytes,
            }
            rows.append(row)
            report(
                f"  {way.name:16} {drive:12} {compute:9} {row['tokens_per_s']:8.2f} tokens/s, "
                f"{row['read_nbytes_per_token'] / (1 << 20):8.2f} MiB read per token, "
                f"{way.memory_nbytes / (1 << 20):8.1f} MiB of memory"
            )
        throttle.limit(None)
    return rows
