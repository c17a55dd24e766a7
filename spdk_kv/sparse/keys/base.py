"""The Protocol of all kinds of keys, and what they check and convert alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)
State = dict[str, npt.NDArray[np.generic]]


class Keys(Protocol):
    """What one layer keeps of its keys. Shapes are learnt from the first append.

    One thread at a time. Nothing here does I/O.
    """

    @property
    def tokens(self) -> int:
        """How many tokens it holds, per batch row."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes, room for further tokens included."""
        ...

    @property
    def kv_heads(self) -> int:
        """KV heads of a key; 0 before the first append."""
        ...

    @property
    def token_nbytes(self) -> float:
        """Bytes that a token of one batch row takes; 0 before the first append."""
        ...

    def append(self, k: torch.Tensor, *, first: Sequence[int] | None = None) -> None:
        """Takes the keys of the next tokens.

        Args:
            k: [batch, kv_heads, tokens, head_dim] after RoPE, any float dtype, on the CPU.
            first: per row, how many of the sequence's first tokens are padding: what is fitted to
                the first append leaves them out. None: no padding.

        Raises:
            ValueError: a shape that does not fit to what was appended before.
        """
        ...

    def scores(self, q: torch.Tensor) -> Floats:
        """Estimates of the products of queries with all keys, not scaled by the head's size.

        Args:
            q: [batch, heads, head_dim] after RoPE, heads a multiple of kv_heads.

        Returns:
            float32 [batch, heads, tokens]; those of a head may all be off by one constant.

        Raises:
            ValueError: a shape that does not fit to the keys.
        """
        ...

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on."""
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; there may be more or fewer rows afterwards."""
        ...

    def copy(self, tokens: int | None = None) -> Keys:
        """A copy of its own, of the first ``tokens`` tokens (None: of all)."""
        ...

    def state(self) -> State:
        """All of it as arrays, which `keys_from_state` takes back."""
        ...


def as_floats(k: torch.Tensor) -> Floats:
    """``k`` as a contiguous float32 array, a copy unless it is one."""
    found: Floats = k.detach().to("cpu", torch.float32).contiguous().numpy()
    return found


def real_tokens(keys: Floats, row: int, first: Sequence[int] | None) -> Floats:
    """[kv_heads, tokens, head_dim]: those of ``row`` that are no padding and finite in all heads.

    ``keys`` [batch, kv_heads, tokens, head_dim] begins with the sequence's first token.
    """
    begin = 0 if first is None else min(max(int(first[row]), 0), keys.shape[2])
    found = keys[row, :, begin:]
    real: Floats = found[:, np.isfinite(found).all(axis=(0, 2))]
    return real


def check_append(k: torch.Tensor, shape: tuple[int, int, int] | None) -> None:
    """``shape``: (batch, kv_heads, head_dim) of what is held, None before the first append."""
    if k.ndim != 4:
        raise ValueError(f"keys are [batch, kv_heads, tokens, head_dim], not {tuple(k.shape)}")
    found = (k.shape[0], k.shape[1], k.shape[3])
    if shape is not None and found != shape:
        raise ValueError(f"keys of (batch, kv_heads, head_dim) {found} follow those of {shape}")


def check_query(q: torch.Tensor, shape: tuple[int, int, int] | None) -> None:
    if shape is None:
        raise ValueError("no keys were appended, so a query has nothing to be scored against")
    batch, kv_heads, head_dim = shape
    fits = q.ndim == 3 and q.shape[0] == batch and q.shape[2] == head_dim
    if not fits or q.shape[1] % kv_heads or not q.shape[1]:
        raise ValueError(
            f"a query is [{batch}, a multiple of {kv_heads}, {head_dim}], not {tuple(q.shape)}"
        )


def taken(
    state: Mapping[str, npt.NDArray[np.generic]], name: str, ndim: int, dtype: type[Scalar]
) -> npt.NDArray[Scalar]:
    """The array ``name`` of a state.

    Raises:
        ValueError: it is missing, or of another kind.
    """
    found = state.get(name)
    if found is None or found.ndim != ndim or found.dtype != np.dtype(dtype):
        raise ValueError(f"a state has {name} as {np.dtype(dtype).name} of {ndim} dimensions")
    return cast("npt.NDArray[Scalar]", found)
