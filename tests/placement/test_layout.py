"""How a sequence's tokens lie in its extents: the numbers of a layout, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spdk_kv.errors import ShapeMismatch
from spdk_kv.placement import SequenceLayout, with_small_chunks
from spdk_kv.types import KVShape, LayerShape

SHAPE = KVShape(layers=3, kv_heads=4, head_dim=8, dtype="float16", max_tokens=100, batch=2)


def test_a_layer_is_two_extents_of_all_heads() -> None:
    layout = SequenceLayout(SHAPE, "layer", 4096)
    layer = layout.layers[0]
    assert layout.layers == (layer,) * 3
    assert (layer.unit_extents, layer.extents, layout.extents) == ((1, 1), 2, 6)
    assert layer.row_shape == (2, 4, 8)
    assert layer.row_nbytes == 128
    assert layer.chunks(100) == 4  # 12,800 bytes
    assert layer.whole_chunks(100) == 3
    assert layout.extent_sizes([1, 2, 0]) == [4096, 4096, 8192, 8192, 0, 0]
    assert layout.extent_sizes([2]) == [8192] * 6


def test_by_head_a_layer_is_an_extent_for_each() -> None:
    layout = SequenceLayout(SHAPE, "head", 4096)
    layer = layout.layers[0]
    assert (layer.unit_extents, layer.extents, layout.extents) == ((4, 4), 8, 24)
    assert layer.row_shape == (2, 8)
    assert layer.row_nbytes == 32
    assert layer.chunks(100) == 1


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_unlike_k_and_v_are_one_extent(granularity: str) -> None:
    latents = LayerShape(1, 512, "bfloat16", value_dim=65)
    mixed = LayerShape(2, 8, "float32", value_dtype="bfloat16")
    even = LayerShape(4, 8, "float16")
    shape = KVShape.of_layers([latents, mixed, even], batch=2)
    layout = SequenceLayout(shape, granularity, 4096)
    first, second, third = layout.layers
    assert (first.order, first.unit_extents, first.values_at) == ("joint", (1,), 1024)
    assert first.row_nbytes == 2 * 1168, "130 bytes of values, up to a multiple of 16"
    assert (second.order, second.values_at, second.row_nbytes) == ("joint", 64, 2 * 96)
    assert third.order == granularity
    assert layout.extents == 2 + third.extents
    assert [each.token_nbytes for each in layout.layers] == [2 * 1154, 2 * 96, 2 * 128]
    assert shape.all_layers_token_nbytes == 2 * (1154 + 96 + 128)


def test_shapes_that_are_equal_are_equal_however_made() -> None:
    like = LayerShape(4, 8, "float16")
    assert KVShape.of_layers([like] * 3, 100, 2) == SHAPE
    assert KVShape.of_layers([like, replace(like, value_dim=4)]).per_layer
    with pytest.raises(ShapeMismatch, match="at least one"):
        KVShape.of_layers([])
    with pytest.raises(ShapeMismatch, match="of_layers"):
        replace(SHAPE, per_layer=(like,) * 2)
    with pytest.raises(ShapeMismatch, match="value_dim"):
        LayerShape(4, 8, "float16", value_dim=-1)


def test_tokens_lie_in_whole_chunks() -> None:
    layout = SequenceLayout(SHAPE, "layer", 4096).layers[0]  # 32 tokens to a chunk
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
        replace(layout, granularity="page")


def test_k_and_v_of_a_token_lie_together_and_each_batch_row_apart() -> None:
    latents = LayerShape(1, 512, "bfloat16", value_dim=65)
    even = LayerShape(4, 8, "float16")
    layout = SequenceLayout(KVShape.of_layers([latents, even], batch=3), "token", 4096)
    first, second = layout.layers
    assert (first.order, first.unit_extents, first.extents) == ("token", (3,), 3)
    assert first.row_nbytes == 1168, "130 bytes of values, up to a multiple of 16"
    assert (second.order, second.values_at, second.row_nbytes) == ("token", 64, 128)
    assert (second.token_nbytes, layout.extents) == (3 * 128, 6)


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "chunk"),
    [(8, 128, "bfloat16", 16384), (3, 64, "float32", 4096), (2, 128, "bfloat16", 4096)],
)
def test_small_chunks_divide_four_tokens_where_they_can(heads, dim, dtype, chunk) -> None:
    layout = with_small_chunks(SequenceLayout(KVShape(2, heads, dim, dtype), "token", 16384))
    assert layout.chunk_nbytes == chunk
