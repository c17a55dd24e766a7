"""A real model beside which there is too little memory for its K and V.

    python bench/kvswap/limited.py JSON      (of a `Task`; run.py calls it)

Each cache reads a text and goes on with it greedily, in a process of its own that has joined a
memory cgroup once model and libraries are there: the limit is on what the text and decoding take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from models import load
from tasks import Text
from transformers import DynamicCache

import spdk_kv
from spdk_kv.binding import MemoryGroup, memory_group, why_impossible
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache, SparseKVCache
from spdk_kv.store import EngineOptions

_SLICE = 64  # tokens of the text that are computed at once: activations take memory as well
KINDS = ("dense in memory", "all from the drive", "a part")
_MIB = 1 << 20


@dataclass(frozen=True)
class Task:
    """``kind``: one of KINDS. ``group``: the cgroup to join; "" for no limit."""

    model: str
    gguf: str | None = None
    kind: str = KINDS[0]
    folder: str = ""
    tokens: int = 3000
    selected: int = 224
    new_tokens: int = 24
    limit_nbytes: int = 80 * _MIB
    group: str = ""
    group_version: int = 2

    @property
    def method(self) -> str:
        """In words."""
        return (
            f"{Path(self.gguf or self.model).name}, a text of {self.tokens} tokens and "
            f"{self.new_tokens} new ones, K and V in float32, {self.selected} tokens selected; "
            f"{self.limit_nbytes // _MIB} MiB beside model and libraries."
        )


def measured(task: Task, folder: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each kind under the limit, after one without. RuntimeError where there are no
    memory cgroups, or the run without a limit fails."""
    if reason := why_impossible():
        raise RuntimeError(f"memory cannot be limited: {reason}")
    rows: list[dict[str, Any]] = []
    for kind, is_limited in ((KINDS[0], False), *((kind, True) for kind in KINDS)):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            found = _in_process(replace(task, kind=kind, folder=own), is_limited)
        if not rows and found["ended"] != "finished":
            raise RuntimeError(f"without a limit: {found['ended']}")
        wanted = (rows or [found])[0]["found"]
        alike = sum(a == b for a, b in zip(found["found"], wanted, strict=False))
        rows.append({**found, "limited": is_limited, "tokens": task.tokens, "alike": alike})
        report(f"  {kind:20} {'limited' if is_limited else '':8} {rows[-1]['ended']}")
    return rows


def _in_process(task: Task, is_limited: bool) -> dict[str, Any]:
    if not is_limited:
        return _run_apart(task)
    with memory_group() as group:
        group.forbid_swap()
        found = _run_apart(replace(task, group=str(group.path), group_version=group.version))
        return {**found, "peak_nbytes": group.peak_nbytes()}


def _run_apart(task: Task) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(task))],
        capture_output=True,
        text=True,
        check=False,
    )
    empty = {"part": "limited", "variant": task.kind, "found": [], "peak_nbytes": None}
    empty |= {"tokens_per_s": None, "prompt_s": None, "read_nbytes_per_token": None}
    if done.returncode == -9:
        return {**empty, "ended": "killed"}
    if done.returncode:
        return {**empty, "ended": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    return {**empty, "ended": "finished", **json.loads(done.stdout.splitlines()[-1])}


def run(task: Task) -> dict[str, Any]:
    """What this process measures."""
    tokenizer, model = load(task.model, task.gguf)
    ids = Text(tokenizer, seed=1, tokens=task.tokens).ids[None]
    _decode(model, ids[:, :_SLICE], 2, DynamicCache(config=model.config))  # kernels and threads
    if task.group:
        group = MemoryGroup(Path(task.group), task.group_version)
        group.limit(task.limit_nbytes)
        group.add(os.getpid())
    if task.kind == KINDS[0]:
        return _decode(model, ids, task.new_tokens, DynamicCache(config=model.config))
    engine = EngineOptions(segment="256 KiB", staging=task.limit_nbytes // 8)
    with spdk_kv.open(f"file://{task.folder}/kv", capacity="1 GiB", engine=engine) as store:
        if task.kind == KINDS[1]:
            cache = OffloadedKVCache(store, model)
        else:
            cache = SparseKVCache(store, model, tokens=task.selected)
        with cache:
            return _decode(model, ids, task.new_tokens, cache)


def _decode(model: Any, ids: torch.Tensor, count: int, cache: Any) -> dict[str, Any]:
    begin, found = time.perf_counter(), []
    with torch.inference_mode():
        for first in range(0, ids.shape[1], _SLICE):
            token = _next(model, ids[:, first : first + _SLICE], cache)
        middle, before = time.perf_counter(), _read(cache)
        for _ in range(count):
            found.append(int(token))
            token = _next(model, token, cache)
    end = time.perf_counter()
    return {
        "found": found,
        "prompt_s": middle - begin,
        "tokens_per_s": count / (end - middle),
        "read_nbytes_per_token": (_read(cache) - before) / count,
    }


def _next(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    logits = model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
    best: torch.Tensor = logits[:, -1:].argmax(-1)
    return best


def _read(cache: Any) -> int:
    return int(cache.stats()["read_nbytes"]) if hasattr(cache, "stats") else 0


if __name__ == "__main__":
    print(json.dumps(run(Task(**json.loads(sys.argv[1])))))
