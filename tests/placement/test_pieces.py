"""Where on the drive a sequence's extents lie: its pieces, and the ground that they make."""

from __future__ import annotations

from spdk_kv.placement import Piece, SequenceLayout, Stretch, grounds, locate
from spdk_kv.types import KVShape

CHUNK = 4096
LAYOUT = SequenceLayout(KVShape(layers=2, kv_heads=1, head_dim=8, dtype="float16"), "layer", CHUNK)


def test_extents_of_a_piece_are_neighbours_or_have_a_run_each() -> None:
    joined = Piece((0,), (2,), (100 * CHUNK,))
    assert joined.allocated(LAYOUT) == [(100 * CHUNK, 8 * CHUNK)]
    assert joined.offsets(LAYOUT) == [
        (100 * CHUNK, 102 * CHUNK),
        (104 * CHUNK, 106 * CHUNK),
    ]
    apart = Piece((0,), (2,), (10, 20, 30, 40))
    assert apart.allocated(LAYOUT) == [(run, 2 * CHUNK) for run in (10, 20, 30, 40)]
    assert apart.offsets(LAYOUT) == [(10, 20), (30, 40)]


def test_a_layer_that_needed_no_more_has_no_part() -> None:
    piece = Piece((3, 5), (3, 6), (10, 20))
    assert piece.allocated(LAYOUT) == [(10, CHUNK), (20, CHUNK)]
    assert piece.offsets(LAYOUT) == [(), (10, 20)]


def test_a_chunk_lies_in_the_last_piece_that_has_it() -> None:
    pieces = [
        Piece((0,), (4,), (0,)),
        Piece((4,), (8,), (1 << 20,)),
        Piece((2, 8), (6, 9), (2 << 20,)),  # layer 0 was cut back to two chunks
    ]
    first, second = grounds(LAYOUT, pieces)
    assert [(each.start // CHUNK, each.end // CHUNK) for each in first] == [(0, 2), (2, 6)]
    assert [(each.start // CHUNK, each.end // CHUNK) for each in second] == [(0, 4), (4, 8), (8, 9)]
    assert first[1].offsets == (2 << 20, (2 << 20) + 4 * CHUNK)
    assert second[2].offsets == ((2 << 20) + 8 * CHUNK, (2 << 20) + 9 * CHUNK)


def test_bytes_are_found_across_stretches() -> None:
    ground = (Stretch(0, 100, (1000, 2000)), Stretch(100, 300, (5000, 6000)))
    assert list(locate(ground, 1, 50, 150)) == [(2050, 50), (6000, 50)]
    assert list(locate(ground, 0, 100, 300)) == [(5000, 200)]
    assert list(locate(ground, 0, 0, 0)) == []
    assert ground[1].of(slice(1, 2)) == Stretch(100, 300, (6000,))
