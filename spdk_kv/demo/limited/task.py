"""One generation under a memory limit, in a process of its own because it may be killed.

    python -m spdk_kv.demo.limited.task '{"variant": "offloaded", "folder": "/mnt/kv", ...}'

The argument is a :class:`Task` as JSON; an :class:`Outcome` is printed as JSON. The model and all
libraries are loaded before the limit is set, so that it limits only what decoding takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdk_kv.binding import MemoryGroup
from spdk_kv.errors import SpdkKvError

if TYPE_CHECKING:
    import torch

    from spdk_kv.demo.model import DemoModel

# Tokens of all rows together that are computed at once while the prompt is read: the activations of
# a long prompt would take more memory than its K/V.
_FORWARD_TOKENS = 64
_WARM_UP_TOKENS = 200
# The KV cache is this many times the limit, so it cannot all be kept in memory. With this many
# layers, the three that are in memory at once (one in use, one being read, one just used) leave
# room for activations.
_TIMES = 1.5
_LAYERS = 16
_MOST_ROWS = 256


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        variant: "in memory", "mapped" or "offloaded".
        folder: folder for files, on the drive.
        location: the store's URI.
        text, model: paths; None for the demo's own.
        group, group_version: the memory cgroup to join; "" for none.
        rows: rows of the batch; 0 for as many as make the KV cache 1.5 times the limit.
        page_cache_dir: as in :func:`spdk_kv.open`; "" for none.
    """

    variant: str
    folder: str
    location: str
    text: str | None
    model: str | None
    prompt_tokens: int
    new_tokens: int
    limit_nbytes: int
    group: str = ""
    group_version: int = 2
    rows: int = 0
    page_cache_dir: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        ended: "finished", "killed", "failed" or "not run"; ``why`` gives the reason.
        tokens: the new tokens, row after row.
        peak_nbytes: the cgroup's peak, page cache included; None without a cgroup.
        residency: what the store's statistics say about paths.
    """

    variant: str
    ended: str
    why: str = ""
    label: str = ""
    rows: int = 0
    kv_nbytes: int = 0
    tokens: list[int] = field(default_factory=list)
    prompt_s: float = 0.0
    decode_s: float = 0.0
    tokens_per_s: float = 0.0
    peak_nbytes: int | None = None
    residency: dict[str, Any] = field(default_factory=dict)


def run_in_subprocess(task: Task) -> Outcome:
    """Runs ``task`` in a new process. Blocks. Failures are reported in the outcome."""
    done = subprocess.run(
        [sys.executable, "-m", "spdk_kv.demo.limited.task", json.dumps(asdict(task))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
    if done.returncode == -9:
        return Outcome(task.variant, "killed", "the kernel found no more memory under the limit")
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Outcome(task.variant, "failed", last)


def _run(task: Task) -> Outcome:
    from transformers import DynamicCache

    from spdk_kv.demo.generation import generate
    from spdk_kv.demo.model import (
        kv_nbytes,
        load_model,
        random_model,
        read_text,
        require_transformers,
    )
    from spdk_kv.store import open as open_store

    require_transformers()
    most = task.prompt_tokens + task.new_tokens
    chosen = load_model(Path(task.model)) if task.model else random_model(most, _LAYERS)
    config = chosen.model.config
    row_nbytes = kv_nbytes(chosen, most)
    rows = task.rows or min(_MOST_ROWS, ceil(_TIMES * task.limit_nbytes / row_nbytes))
    prompt = _prompt(chosen, read_text(Path(task.text) if task.text else None), task, rows)
    # A warm-up: the first pass also sets up torch's threads and kernels.
    short = prompt[:, :_WARM_UP_TOKENS]
    generate(chosen.model, short, 2, DynamicCache(config=config), _nothing, _chunk(rows))

    make = {"in memory": _in_memory, "mapped": _mapped, "offloaded": _offloaded}[task.variant]
    with open_store("null://"):
        pass  # loads this package's own code
    if task.group:
        group = MemoryGroup(Path(task.group), task.group_version)
        group.limit(task.limit_nbytes)
        group.add(os.getpid())
    found = make(task, chosen, prompt, rows * row_nbytes)
    if found is None:
        why = "the model has layers that keep less than all tokens"
        return Outcome(task.variant, "not run", why, chosen.label, rows)
    generation, residency = found
    return Outcome(
        task.variant,
        "finished",
        label=chosen.label,
        rows=rows,
        kv_nbytes=rows * kv_nbytes(chosen, most - 1),
        tokens=generation.tokens,
        prompt_s=generation.prompt_s,
        decode_s=generation.decode_s,
        tokens_per_s=generation.tokens_per_s,
        residency=residency,
    )


def _chunk(rows: int) -> int:
    return max(1, _FORWARD_TOKENS // rows)


def _nothing(count: int) -> None:
    pass


Found = tuple[Any, dict[str, Any]] | None
Make = Callable[[Task, "DemoModel", "torch.Tensor", int], Found]


def _in_memory(task: Task, chosen: DemoModel, prompt: torch.Tensor, nbytes: int) -> Found:
    from transformers import DynamicCache

    return _generate(task, chosen, prompt, DynamicCache(config=chosen.model.config)), {}


def _mapped(task: Task, chosen: DemoModel, prompt: torch.Tensor, nbytes: int) -> Found:
    from spdk_kv.demo.limited.mapped import mapped_cache

    most = task.prompt_tokens + task.new_tokens
    cache = mapped_cache(chosen.model.config, Path(task.folder), most)
    return None if cache is None else (_generate(task, chosen, prompt, cache), {})


def _offloaded(task: Task, chosen: DemoModel, prompt: torch.Tensor, nbytes: int) -> Found:
    from spdk_kv.integrations.transformers import OffloadedKVCache
    from spdk_kv.store import EngineOptions, PageCacheOptions
    from spdk_kv.store import open as open_store
    from spdk_kv.units import MIB

    config = chosen.model.config
    # The engine's own memory is twice the depth in segments, which by default would be 32 MiB.
    engine = EngineOptions(segment="256 KiB", staging=task.limit_nbytes // 8)
    page_cache = PageCacheOptions(folder=task.page_cache_dir or None)
    capacity = None
    if task.location == f"file://{task.folder}":
        # More room than that: extents are whole chunks, and the store needs some for itself.
        capacity = nbytes + nbytes // 8 + 64 * MIB
    most = task.prompt_tokens + task.new_tokens
    with (
        open_store(task.location, capacity=capacity, engine=engine, page_cache=page_cache) as store,
        OffloadedKVCache(store, config, max_tokens=most) as cache,
    ):
        generation = _generate(task, chosen, prompt, cache)
        return generation, store.stats()["residency"]


def _generate(task: Task, chosen: DemoModel, prompt: torch.Tensor, cache: Any) -> Any:
    from spdk_kv.demo.generation import generate

    return generate(chosen.model, prompt, task.new_tokens, cache, _nothing, _chunk(len(prompt)))


def _prompt(chosen: DemoModel, text: str, task: Task, rows: int) -> torch.Tensor:
    """``[rows, prompt_tokens]``: the text, rotated to begin at another place in each row."""
    import torch

    from spdk_kv.demo.model import prompt_tokens

    first = prompt_tokens(chosen.tokenizer, text, task.prompt_tokens)[0]
    return torch.stack([first.roll(-row * (len(first) // rows or 1)) for row in range(rows)])


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_run(Task(**json.loads(sys.argv[1]))))))
    except (SpdkKvError, OSError, ValueError, RuntimeError) as failed:
        sys.exit(f"{type(failed).__name__}: {failed}")
