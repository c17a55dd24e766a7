"""Two bits per element of a key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from spdk_kv._native.score import encode, score
from spdk_kv.sparse.keys.base import (
    Floats,
    State,
    as_floats,
    check_append,
    check_query,
    real_tokens,
    taken,
)
from spdk_kv.sparse.keys.growing import Growing
from spdk_kv.sparse.threads import in_parts


class Codes:
    """2-bit codes: a key less the mean, rotated (signs, then Walsh-Hadamard), as four levels.

    The mean is that of the real, finite tokens of the first append, per batch row and KV head; the
    rotation spreads what stands out in few elements over all of them. Each token has a scale of
    its own, for the keys of attention sinks are far larger than others. head_dim / 4 + 4 bytes per
    token and KV head. A key that is not finite scores 0. See `Keys`.
    """

    def __init__(self) -> None:
        self._means: Floats | None = None  # [batch, kv_heads, head_dim]
        self._codes: Growing[np.uint8] | None = None  # [batch, kv_heads, tokens, head_dim / 4]
        self._scales: Growing[np.float32] | None = None  # [batch, kv_heads, tokens, 1]

    @property
    def tokens(self) -> int:
        return 0 if self._codes is None else self._codes.tokens

    @property
    def nbytes(self) -> int:
        if self._means is None or self._codes is None or self._scales is None:
            return 0
        return self._means.nbytes + self._codes.nbytes + self._scales.nbytes

    @property
    def kv_heads(self) -> int:
        return 0 if self._shape is None else self._shape[1]

    @property
    def token_nbytes(self) -> float:
        if self._codes is None or self._scales is None:
            return 0.0
        return self._codes.token_nbytes + self._scales.token_nbytes

    def append(self, k: torch.Tensor, *, first: Sequence[int] | None = None) -> None:
        """As `Keys.append`; head_dim is a multiple of 4."""
        check_append(k, self._shape)
        keys = as_floats(k)
        batch, kv_heads, tokens, head_dim = keys.shape
        if head_dim % 4:
            raise ValueError(f"codes need a head_dim that is a multiple of 4, not {head_dim}")
        if not tokens:
            return
        if not self.tokens:
            self._means = _means(keys, first)
            self._codes = Growing(np.empty((batch, kv_heads, 0, head_dim // 4), np.uint8))
            self._scales = Growing(np.empty((batch, kv_heads, 0, 1), np.float32))
        assert self._means is not None
        assert self._codes is not None
        assert self._scales is not None
        codes, scales = self._codes.more(tokens), self._scales.more(tokens)
        signs = _signs(head_dim)
        for row in range(batch):
            for head in range(kv_heads):
                encode(
                    keys[row, head],
                    self._means[row, head],
                    signs,
                    codes[row, head],
                    scales[row, head, :, 0],
                )

    def scores(self, q: torch.Tensor) -> Floats:
        """As `Keys.scores`: the products with the keys less their mean."""
        check_query(q, self._shape)
        assert self._codes is not None
        assert self._scales is not None
        codes, scales = self._codes.held, self._scales.held
        batch, kv_heads, tokens, _ = codes.shape
        queries = as_floats(q)
        signs = _signs(queries.shape[2])
        out = np.empty((batch, queries.shape[1], tokens), np.float32)
        of_each = queries.shape[1] // kv_heads

        def score_head(number: int) -> None:
            row, head = divmod(number, kv_heads)
            mine = slice(head * of_each, (head + 1) * of_each)
            score(
                queries[row, mine],
                signs,
                codes[row, head],
                scales[row, head, :, 0],
                out[row, mine],
            )

        in_parts(score_head, batch * kv_heads, queries.size * tokens)
        return out

    def truncate(self, tokens: int) -> None:
        if self._codes is not None and self._scales is not None:
            self._codes.truncate(tokens)
            self._scales.truncate(tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        if self._means is not None and self._codes is not None and self._scales is not None:
            self._means = self._means[np.asarray(rows, np.int64)]
            self._codes.reorder(rows)
            self._scales.reorder(rows)

    def copy(self, tokens: int | None = None) -> Codes:
        other = Codes()
        if self._means is not None and self._codes is not None and self._scales is not None:
            other._means = self._means.copy()
            other._codes = self._codes.copy(tokens)
            other._scales = self._scales.copy(tokens)
        return other

    def state(self) -> State:
        if self._means is None or self._codes is None or self._scales is None:
            return {}
        return {"means": self._means, "codes": self._codes.held, "scales": self._scales.held}

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[np.generic]]) -> Codes:
        """What `state` gave; an empty one is that of an object without tokens.

        Raises:
            ValueError: arrays are missing or do not fit to each other.
        """
        made = cls()
        if not state:
            return made
        means = taken(state, "means", 3, np.float32)
        codes = taken(state, "codes", 4, np.uint8)
        scales = taken(state, "scales", 4, np.float32)
        batch, kv_heads, head_dim = means.shape
        if codes.shape != (batch, kv_heads, codes.shape[2], head_dim / 4) or scales.shape != (
            *codes.shape[:3],
            1,
        ):
            raise ValueError(
                f"means {means.shape}, codes {codes.shape} and scales {scales.shape} differ"
            )
        made._means, made._codes, made._scales = means.copy(), Growing(codes), Growing(scales)
        return made

    @property
    def _shape(self) -> tuple[int, int, int] | None:
        if self._means is None or not self.tokens:
            return None
        batch, kv_heads, head_dim = self._means.shape
        return batch, kv_heads, head_dim


def _means(keys: Floats, first: Sequence[int] | None) -> Floats:
    means = np.zeros((keys.shape[0], keys.shape[1], keys.shape[3]), np.float32)
    for row in range(len(keys)):
        real = real_tokens(keys, row, first)
        if real.shape[1]:
            means[row] = real.mean(axis=1, dtype=np.float64)
    return means


@cache
def _signs(head_dim: int) -> Floats:
    """+-1 at random, but always the same: codes that were stored are scored with them again."""
    bits = np.unpackbits(
        np.frombuffer(hashlib.shake_128(b"spdk_kv 2-bit codes").digest(-(-head_dim // 8)), np.uint8)
    )
    return 2 * bits[:head_dim].astype(np.float32) - 1
