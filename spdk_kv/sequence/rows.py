"""K and V as rows, in the order in which they lie on the drive, and rows as K and V."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spdk_kv.placement import LayerLayout
from spdk_kv.types import movable, torch_dtypes

if TYPE_CHECKING:
    import torch

# Cores below which torch's own threads do harm: see _copy.
_FEW_CORES = 4


def lay_out(
    layout: LayerLayout, into: torch.Tensor, at: int, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Writes K and V, ``[batch, kv_heads, tokens, head_dim]``, as rows into ``into``, bytes
    ``[extents, nbytes]``, from byte ``at`` of every extent on."""
    k, v = movable(k), movable(v)
    target = into[:, at : at + k.shape[2] * layout.row_nbytes]
    for rows, values in zip(_halves(layout, target, k.dtype, v.dtype), (k, v), strict=True):
        _copy(rows, values)


def as_pair(layout: LayerLayout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, ``[batch, kv_heads, tokens, head_dim]``: views of ``rows``, bytes
    ``[extents, nbytes]`` of whole tokens."""
    dtypes = torch_dtypes()
    if not rows.shape[1]:
        return _empty(layout, rows, dtypes)
    return _halves(layout, rows, dtypes[layout.shape.dtype], dtypes[layout.shape.value_dtype])


def _empty(
    layout: LayerLayout, rows: torch.Tensor, dtypes: Mapping[str, torch.dtype]
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, front = layout.shape, (layout.batch, layout.shape.kv_heads, 0)
    return (
        rows.new_empty((*front, shape.head_dim), dtype=dtypes[shape.dtype]),
        rows.new_empty((*front, shape.value_dim or 0), dtype=dtypes[shape.value_dtype]),
    )


def _halves(
    layout: LayerLayout, rows: torch.Tensor, key_dtype: torch.dtype, value_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as views of ``rows``, in dtypes of the size of theirs."""
    tokens, shape = rows.shape[1] // layout.row_nbytes, layout.shape
    heads = shape.kv_heads
    if layout.order in ("joint", "token"):
        if layout.order == "joint":
            own = rows.view(tokens, layout.batch, -1).transpose(0, 1)
        else:
            own = rows.view(layout.batch, tokens, -1)
        keys = own[..., : shape.key_nbytes].view(key_dtype)
        values = own[..., layout.values_at : layout.values_at + shape.value_nbytes].view(
            value_dtype
        )
        return (
            keys.view(*own.shape[:2], heads, shape.head_dim).transpose(1, 2),
            values.view(*own.shape[:2], heads, shape.value_dim or 0).transpose(1, 2),
        )
    both = rows.view(key_dtype).view(layout.extents, tokens, *layout.row_shape)
    if layout.order == "head":
        return both[:heads].permute(2, 0, 1, 3), both[heads:].permute(2, 0, 1, 3)
    return both[0].permute(1, 2, 0, 3), both[1].permute(1, 2, 0, 3)


def _copy(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copies to and from any torch device.

    On few cores only this thread copies: torch's own threads spin after each copy, waiting for the
    next, on a core that the kernel needs for the drive.
    """
    if values.is_cpu and into.is_cpu and len(os.sched_getaffinity(0)) <= _FEW_CORES:
        np.copyto(into.numpy(), values.numpy())
    else:
        into.copy_(values)
