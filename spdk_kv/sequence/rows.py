"""Appended tokens laid out as rows, in the order in which they lie on the drive."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from spdk_kv.placement import SequenceLayout
from spdk_kv.types import movable

if TYPE_CHECKING:
    import torch

# Cores below which torch's own threads do harm: see _copy.
_FEW_CORES = 4


def lay_out(
    layout: SequenceLayout, into: torch.Tensor, at: int, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Writes K and V, ``[batch, kv_heads, tokens, head_dim]``, as rows into ``into``, bytes
    ``[extents, nbytes]``, from byte ``at`` of every extent on."""
    count, extents = k.shape[2], into.shape[0]
    k, v = movable(k), movable(v)
    target = into[:, at : at + count * layout.row_nbytes].view(k.dtype)
    rows = target.view(extents, count, *layout.row_shape)
    if layout.granularity == "head":
        heads = layout.extents_per_unit
        _copy(rows[:heads], k.permute(1, 2, 0, 3))
        _copy(rows[heads:], v.permute(1, 2, 0, 3))
    else:
        _copy(rows[0], k.permute(2, 0, 1, 3))
        _copy(rows[1], v.permute(2, 0, 1, 3))


def _copy(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copies to and from any torch device.

    On few cores only this thread copies: torch's own threads spin after each copy, waiting for the
    next, on a core that the kernel needs for the drive.
    """
    if values.is_cpu and into.is_cpu and len(os.sched_getaffinity(0)) <= _FEW_CORES:
        np.copyto(into.numpy(), values.numpy())
    else:
        into.copy_(values)
