"""What callers give to a sequence, checked before anything is changed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from spdk_kv.errors import ShapeMismatch
from spdk_kv.types import KVShape, dtype_name

if TYPE_CHECKING:
    import torch


def check_tokens(shape: KVShape, k: torch.Tensor, v: torch.Tensor) -> None:
    """ShapeMismatch unless both are ``[batch, kv_heads, tokens, head_dim]`` of ``shape``, and of
    equally many tokens."""
    for name, tensor in (("k", k), ("v", v)):
        found = tuple(tensor.shape)
        if len(found) != 4 or (*found[:2], found[3]) != (
            shape.batch,
            shape.kv_heads,
            shape.head_dim,
        ):
            raise ShapeMismatch(
                f"{name} is {list(found)}; wanted is [batch={shape.batch}, "
                f"kv_heads={shape.kv_heads}, tokens, head_dim={shape.head_dim}]"
            )
        if dtype_name(tensor.dtype) != shape.dtype:
            raise ShapeMismatch(f"{name} is {tensor.dtype}; the sequence holds {shape.dtype}")
    if k.shape != v.shape:
        raise ShapeMismatch(f"k is {list(k.shape)}, but v {list(v.shape)}")


def token_range(count: int, tokens: slice | None) -> tuple[int, int]:
    """First and last of the ``tokens`` of ``count``; ShapeMismatch where they are not in a row."""
    if tokens is None:
        return 0, count
    first, last, step = tokens.indices(count)
    if step != 1:
        raise ShapeMismatch(f"a slice of tokens has step 1, not {step}")
    return first, max(first, last)


def head_list(count: int, heads: Iterable[int] | slice | None) -> list[int] | None:
    """``heads`` of ``count`` one by one; None is all of them, as they lie."""
    if heads is None:
        return None
    if isinstance(heads, slice):
        return list(range(*heads.indices(count)))
    wanted = [operator.index(head) for head in heads]
    if any(not 0 <= head < count for head in wanted):
        raise ShapeMismatch(f"heads are 0 to {count - 1}, not {wanted}")
    return wanted


def batch_order(batch: int, rows: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``rows`` as an index; ShapeMismatch unless there is one row of the batch for each."""
    index = np.asarray([operator.index(row) for row in rows], dtype=np.int64)
    if index.shape != (batch,) or index.min() < 0 or index.max() >= batch:
        raise ShapeMismatch(f"reorder takes {batch} rows from 0 to {batch - 1}, not {index}")
    return index
