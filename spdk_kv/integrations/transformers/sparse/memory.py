"""How much memory reading a part takes, told before a prompt is computed for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from spdk_kv.errors import CapacityError
from spdk_kv.memory import available_for_page_cache, read_memory
from spdk_kv.sparse import Settings, make_keys
from spdk_kv.types import KVShape, LayerShape
from spdk_kv.units import format_nbytes

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Needs:
    """Bytes of host memory: for K and V of resident groups and newest tokens, and for what groups
    are selected by."""

    tokens: int
    resident_nbytes: int
    metadata_nbytes: int

    @property
    def nbytes(self) -> int:
        return self.resident_nbytes + self.metadata_nbytes


def needs_of(
    shape: KVShape,
    layers: Mapping[int, Floats | None],
    tokens: int,
    settings: Settings,
) -> Needs:
    """What ``layers`` (with their adapters) need once each has ``tokens`` tokens per row."""
    group = settings.group_tokens
    held = min(tokens, settings.slots * group + settings.recent + group)
    resident = metadata = 0
    for number, adapter in layers.items():
        layer = shape.layer(number)
        resident += shape.batch * held * (layer.key_nbytes + layer.value_nbytes)
        metadata += int(shape.batch * tokens * key_nbytes(layer, settings, adapter))
    return Needs(tokens, resident, metadata)


def key_nbytes(layer: LayerShape, settings: Settings, adapter: Floats | None) -> float:
    """Bytes that are kept to select one token of one row by."""
    width = layer.kv_heads * layer.head_dim
    if adapter is None:  # as many directions as will be fitted
        adapter = np.eye(width, settings.rank or max(1, width // 8), dtype=np.float32)
    keys = make_keys(settings, adapter)
    keys.append(torch.zeros(1, layer.kv_heads, 1, layer.head_dim))
    return keys.token_nbytes


def check(needs: Needs, held_nbytes: int, limit_nbytes: int | None) -> None:
    """CapacityError where there is less than ``needs``, of which ``held_nbytes`` are held already.

    ``limit_nbytes``: what it may take; None is what the machine has left, if that is known.
    """
    if limit_nbytes is not None:
        room, whose = limit_nbytes, "memory= allows"
    else:
        snapshot = read_memory()
        if snapshot.available_nbytes is None and not snapshot.limits:
            return
        room, whose = available_for_page_cache(snapshot, 0) + held_nbytes, "there is room for"
    if needs.nbytes <= room:
        return
    raise CapacityError(
        f"reading a part of {needs.tokens} tokens takes {format_nbytes(needs.nbytes)} of host "
        f"memory: {format_nbytes(needs.resident_nbytes)} for resident groups and "
        f"{format_nbytes(needs.metadata_nbytes)} to select by; {whose} {format_nbytes(room)}. "
        "Choose fewer tokens=, or settings with a smaller pool"
    )
