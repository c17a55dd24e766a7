"""The demo's measurement: one generation with one cache."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdk_kv.binding import reset_peak_rss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """``tokens``: the new ones, row after row. ``prompt_s``: until the first of them;
    ``decode_s``: for all the others. ``peak_rss_nbytes``: the process's most resident memory during
    the run."""

    tokens: list[int]
    prompt_s: float
    decode_s: float
    peak_rss_nbytes: int
    rows: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, the prompt not counted (unless there is only its one token)."""
        if len(self.tokens) <= self.rows:
            return len(self.tokens) / self.prompt_s
        return (len(self.tokens) - self.rows) / self.decode_s


class _Stopwatch:
    """A streamer for ``generate``: notes when tokens arrive."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.times: list[float] = []
        self._advance = advance

    def put(self, tokens: torch.Tensor) -> None:
        # The first call has the prompt, before anything was computed.
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self._advance(1)

    def end(self) -> None:
        """Nothing is left to be told."""


def run(
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int,
    cache: Any,
    advance: Callable[[int], None],
    chunk_tokens: int | None = None,
) -> Run:
    """Continues ``prompt``, ``[rows, tokens]``, greedily, with ``cache``. ``advance(1)`` is called
    for every token. ``chunk_tokens``: of the prompt, computed at once; None: all."""
    import torch

    from spdk_kv.integrations.transformers import CACHE_ARGUMENT

    reset_peak_rss()
    watch = _Stopwatch(advance)
    told = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=watch,
        prefill_chunk_size=chunk_tokens,
    )
    begin, first, last = watch.times[0], watch.times[1], watch.times[-1]
    tokens = told[:, prompt.shape[1] :].flatten().tolist()
    return Run(tokens, first - begin, last - first, _peak_rss_nbytes(), len(prompt))


def _peak_rss_nbytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
