"""Where a sequence's tokens lie: the numbers of a layout, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spdk_kv.errors import ShapeMismatch
from spdk_kv.placement import SequenceLayout
from spdk_kv.types import KVShape

SHAPE = KVShape(layers=3, kv_heads=4, head_dim=8, dtype="float16", max_tokens=100, batch=2)


def test_a_layer_is_two_extents_of_all_heads() -> None:
    layout = SequenceLayout(SHAPE, "layer", 4096)
    assert (layout.extents_per_unit, layout.extents_per_layer, layout.extents) == (1, 2, 6)
    assert layout.row_shape == (2, 4, 8)
    assert layout.row_nbytes == 128
    assert layout.extent_nbytes == 16384  # 12,800 bytes in whole chunks
    assert layout.unit_extents([10, 20]) == [((10, 16384),), ((20, 16384),)]


def test_by_head_a_layer_is_an_extent_for_each() -> None:
    layout = SequenceLayout(SHAPE, "head", 4096)
    assert (layout.extents_per_unit, layout.extents_per_layer, layout.extents) == (4, 8, 24)
    assert layout.row_shape == (2, 8)
    assert layout.row_nbytes == 32
    assert layout.extent_nbytes == 4096
    keys, values = layout.unit_extents(list(range(8)))
    assert keys == tuple((at, 4096) for at in range(4))
    assert values == tuple((at, 4096) for at in range(4, 8))


def test_tokens_lie_in_whole_chunks() -> None:
    layout = SequenceLayout(SHAPE, "layer", 4096)  # 32 tokens to a chunk
    assert layout.token_range(0, 0) == (0, 0)
    assert layout.token_range(0, 32) == (0, 4096)
    assert layout.token_range(31, 33) == (0, 8192)
    assert layout.token_range(32, 64) == (4096, 8192)


@pytest.mark.parametrize("chunk_nbytes", [0, 2048, 4097, 12288])
def test_a_chunk_is_a_power_of_two_from_a_page_on(chunk_nbytes: int) -> None:
    layout = SequenceLayout(SHAPE, "layer", 4096)
    with pytest.raises(ShapeMismatch, match="power of two"):
        replace(layout, chunk_nbytes=chunk_nbytes)
    with pytest.raises(ShapeMismatch, match="granularity"):
        replace(layout, granularity="token")
