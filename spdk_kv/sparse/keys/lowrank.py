"""A low-rank projection of all KV heads' keys together, as in KVSwap (arXiv 2511.11907)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

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

FIT_TOKENS = 4096
_LARGEST = float(np.finfo(np.float16).max)


class LowRank:
    """The keys of all KV heads of a token, joined and projected onto a few directions: 2 bytes of
    float16 per token and direction.

    The directions are those of a singular value decomposition, not centred: of many texts where an
    ``adapter`` is given, else of the real tokens of the first append, at most FIT_TOKENS of them
    evenly spaced. So a first append of few tokens describes what follows badly. See `Keys`.
    """

    def __init__(self, rank: int | None = None, adapter: Floats | None = None) -> None:
        """
        Args:
            rank: directions; None: an eighth of kv_heads * head_dim, or those of ``adapter``.
            adapter: float32 [kv_heads * head_dim, at least rank], orthonormal columns, those that
                matter most first.

        Raises:
            ValueError: the adapter has fewer than ``rank`` directions.
        """
        if adapter is not None:
            if adapter.ndim != 2 or (rank is not None and adapter.shape[1] < rank):
                raise ValueError(f"an adapter of shape {adapter.shape} has no {rank} directions")
            adapter = np.ascontiguousarray(adapter[:, :rank], np.float32)
        self._rank = rank
        self._given = adapter
        self._adapter: Floats | None = None  # [kv_heads, head_dim, rank]
        self._low: Growing[np.float16] | None = None  # [batch, tokens, rank]

    @property
    def tokens(self) -> int:
        return 0 if self._low is None else self._low.tokens

    @property
    def nbytes(self) -> int:
        if self._adapter is None or self._low is None:
            return 0
        return self._adapter.nbytes + self._low.nbytes

    @property
    def kv_heads(self) -> int:
        return 0 if self._shape is None else self._shape[1]

    @property
    def token_nbytes(self) -> float:
        return 0.0 if self._low is None else self._low.token_nbytes

    def append(self, k: torch.Tensor, *, first: Sequence[int] | None = None) -> None:
        check_append(k, self._shape)
        keys = as_floats(k)
        batch, kv_heads, tokens, head_dim = keys.shape
        if not tokens:
            return
        if not self.tokens:
            self._adapter = self._fitted(keys, first).reshape(kv_heads, head_dim, -1)
            self._low = Growing(np.empty((batch, 0, self._adapter.shape[2]), np.float16))
        assert self._adapter is not None
        assert self._low is not None
        with np.errstate(invalid="ignore", over="ignore"):
            low = np.einsum("bhtd,hdr->btr", keys, self._adapter, optimize=True)
            self._low.append(np.clip(low, -_LARGEST, _LARGEST).astype(np.float16))

    def scores(self, q: torch.Tensor) -> Floats:
        check_query(q, self._shape)
        assert self._adapter is not None
        assert self._low is not None
        kv_heads, head_dim, _ = self._adapter.shape
        queries = as_floats(q).reshape(len(q), kv_heads, -1, head_dim)
        with np.errstate(invalid="ignore", over="ignore"):
            turned = (queries @ self._adapter).reshape(len(q), q.shape[1], -1)
            # By torch, whose conversion is many times as fast as numpy's.
            low = torch.from_numpy(self._low.held).float().numpy()
            found: Floats = turned @ low.swapaxes(-1, -2)
        return found

    def truncate(self, tokens: int) -> None:
        if self._low is not None:
            self._low.truncate(tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        if self._low is not None:
            self._low.reorder(rows)

    def copy(self, tokens: int | None = None) -> LowRank:
        other = LowRank(self._rank, self._given)
        if self._adapter is not None and self._low is not None:
            other._adapter = self._adapter
            other._low = self._low.copy(tokens)
        return other

    def state(self) -> State:
        if self._adapter is None or self._low is None:
            return {}
        return {"adapter": self._adapter, "low": self._low.held}

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[np.generic]]) -> LowRank:
        """What `state` gave; an empty one is that of an object without tokens.

        Raises:
            ValueError: arrays are missing or do not fit to each other.
        """
        made = cls()
        if not state:
            return made
        adapter = taken(state, "adapter", 3, np.float32)
        low = taken(state, "low", 3, np.float16)
        if low.shape[2] != adapter.shape[2]:
            raise ValueError(f"an adapter {adapter.shape} and projections {low.shape} differ")
        made._rank = adapter.shape[2]
        made._adapter, made._low = adapter.copy(), Growing(low)
        return made

    @property
    def _shape(self) -> tuple[int, int, int] | None:
        if self._adapter is None or self._low is None or not self.tokens:
            return None
        kv_heads, head_dim, _ = self._adapter.shape
        return self._low.held.shape[0], kv_heads, head_dim

    def _fitted(self, keys: Floats, first: Sequence[int] | None) -> Floats:
        width = keys.shape[1] * keys.shape[3]
        if self._given is not None:
            if len(self._given) != width:
                raise ValueError(f"an adapter for keys of {len(self._given)} elements, not {width}")
            return self._given
        rank = min(self._rank or max(width // 8, 1), width)
        return directions([real_tokens(keys, row, first) for row in range(len(keys))], rank=rank)


def directions(samples: Sequence[Floats], *, rank: int) -> Floats:
    """The ``rank`` directions that hold most of some keys.

    Args:
        samples: each [kv_heads, tokens, head_dim], finite, of any number of tokens.
        rank: at most kv_heads * head_dim.

    Returns:
        float32 [kv_heads * head_dim, rank], orthonormal, those that hold most first.
    """
    width = samples[0].shape[0] * samples[0].shape[2]
    joined = [sample.swapaxes(0, 1).reshape(-1, width) for sample in samples]
    rows = np.concatenate(joined).astype(np.float64)
    rows = rows[:: max(-(-len(rows) // FIT_TOKENS), 1)]
    # The right singular vectors, by the Gram matrix: it has the size of a key, not of a text.
    _, vectors = np.linalg.eigh(rows.T @ rows)
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank], np.float32)
