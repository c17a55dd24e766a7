"""One measured generation with one cache."""

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
class Generation:
    """New tokens and what they took.

    Attributes:
        tokens: the new tokens, row after row.
        prompt_s: seconds until the first of them.
        decode_s: seconds for all the others.
        peak_rss_nbytes: the process's peak resident memory meanwhile.
        rows: rows of the batch.
    """

    tokens: list[int]
    prompt_s: float
    decode_s: float
    peak_rss_nbytes: int
    rows: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed without the prompt (with it, if there is only one token per row)."""
        if len(self.tokens) <= self.rows:
            return len(self.tokens) / self.prompt_s
        return (len(self.tokens) - self.rows) / self.decode_s


class _Stopwatch:
    """A streamer for transformers' ``generate``: notes when tokens arrive."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.times: list[float] = []
        self._advance = advance

    def put(self, tokens: torch.Tensor) -> None:
        # The first call passes the prompt, before anything is computed.
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self._advance(1)

    def end(self) -> None:
        """transformers requires it; there is nothing left to do."""


def generate(
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int,
    cache: Any,
    advance: Callable[[int], None],
    chunk_tokens: int | None = None,
) -> Generation:
    """Continues ``prompt`` greedily, with its KV cache in ``cache``. Blocks.

    Args:
        model: a causal language model of transformers.
        prompt: token ids, ``[rows, tokens]``.
        new_tokens: tokens to add to each row.
        cache: an empty cache of transformers.
        advance: called with 1 for every new token.
        chunk_tokens: tokens of the prompt to compute at once; None for all.
    """
    import torch

    from spdk_kv.integrations.transformers import CACHE_ARGUMENT

    reset_peak_rss()
    watch = _Stopwatch(advance)
    output = model.generate(
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
    tokens = output[:, prompt.shape[1] :].flatten().tolist()
    return Generation(tokens, first - begin, last - first, _peak_rss_nbytes(), len(prompt))


def _peak_rss_nbytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
