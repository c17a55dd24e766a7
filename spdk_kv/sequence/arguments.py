"""The arguments of a sequence's methods, checked before anything is changed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv.errors import ShapeMismatch
from spdk_kv.placement import LayerLayout
from spdk_kv.tensors import check_dense
from spdk_kv.types import dtype_name

if TYPE_CHECKING:
    import torch


def check_tokens(layout: LayerLayout, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ShapeMismatch unless both are dense tensors ``[batch, kv_heads, tokens, head_dim]`` of
    the layer's shape, with as many tokens each."""
    import torch

    shape, batch = layout.shape, layout.batch
    expected = (("k", k, shape.head_dim, shape.dtype), ("v", v, shape.value_dim, shape.value_dtype))
    for name, tensor, head_dim, dtype in expected:
        if not isinstance(tensor, torch.Tensor):
            raise ShapeMismatch(f"{name} is a torch tensor, not {type(tensor).__name__}")
        check_dense(tensor, name)
        found = tuple(tensor.shape)
        if len(found) != 4 or (*found[:2], found[3]) != (batch, shape.kv_heads, head_dim):
            raise ShapeMismatch(
                f"{name} is {list(found)}, not [batch={batch}, kv_heads={shape.kv_heads}, tokens, "
                f"head_dim={head_dim}]"
            )
        if dtype_name(tensor.dtype) != dtype:
            raise ShapeMismatch(f"{name} is {tensor.dtype}; the sequence holds {dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ShapeMismatch(f"k is {list(k.shape)}, but v {list(v.shape)}")


def token_range(count: int, tokens: slice | None) -> tuple[int, int]:
    """The slice ``tokens`` of ``count`` tokens as (first, end). Raises ShapeMismatch where it has
    gaps."""
    if tokens is None:
        return 0, count
    first, last, step = tokens.indices(count)
    if step != 1:
        raise ShapeMismatch(f"a slice of tokens has step 1, not {step}")
    return first, max(first, last)


def head_list(count: int, heads: Iterable[int] | slice | None) -> list[int] | None:
    """``heads`` of ``count`` as numbers; None stands for all, in their order."""
    if heads is None:
        return None
    if isinstance(heads, slice):
        return list(range(*heads.indices(count)))
    chosen = [operator.index(head) for head in heads]
    if any(not 0 <= head < count for head in chosen):
        raise ShapeMismatch(f"heads are 0 to {count - 1}, not {chosen}")
    return chosen


def batch_order(batch: int, rows: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``rows`` as an index. Raises ShapeMismatch unless it names one row for each batch row."""
    index = np.asarray([operator.index(row) for row in rows], dtype=np.int64)
    if index.shape != (batch,) or index.min() < 0 or index.max() >= batch:
        raise ShapeMismatch(f"reorder takes {batch} rows from 0 to {batch - 1}, not {index}")
    return index


def group_list(groups: Any, group_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``groups`` as ``[n, 2]``: row of the batch and number of each. Raises ShapeMismatch where
    they are anything else, or their size is not positive."""
    if operator.index(group_tokens) < 1:
        raise ShapeMismatch(f"a group has at least one token, not {group_tokens}")
    found = np.asarray(groups)
    if found.size == 0:
        return np.empty((0, 2), np.int64)
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise ShapeMismatch(
            f"groups are whole numbers [n, 2], not {found.dtype} {list(found.shape)}"
        )
    return found.astype(np.int64)
