"""Blobs whose bytes lie in several places of memory: reached where they are, or by a copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spdk_kv
from spdk_kv.errors import CorruptionError, KeyNotFound, ShapeMismatch
from spdk_kv.scattered import Scattered
from spdk_kv.testing import memory
from spdk_kv.testing.engines import property_test

BLOCK = 4096
ENGINES = ("uring", "threads", "pagecache", "ram")


@pytest.fixture(params=ENGINES)
def store(request, tmp_path) -> Iterator[spdk_kv.KVStore]:
    where = "ram://" if request.param == "ram" else f"file://{tmp_path}/kv"
    with spdk_kv.open(where, capacity="32 MiB", engine=request.param) as found:
        yield found


def scattered(sizes: list[int], seed: int | None = None, shift: int = 0) -> Scattered:
    """Pieces of ``sizes``, of noise, or of a known byte to get over."""
    pieces = [memory(nbytes, shift) for nbytes in sizes]
    for number, piece in enumerate(pieces):
        piece[:] = 0x5A if seed is None else np.random.default_rng([seed, number]).bytes(1)[0]
        if seed is not None and piece.nbytes:
            piece[-1] = number
    return Scattered(pieces)


def whole(value: Scattered) -> bytes:
    return b"".join(piece.tobytes() for piece in value.pieces)


@pytest.mark.parametrize(
    "sizes",
    [
        [BLOCK], [BLOCK, BLOCK, BLOCK], [64 << 10] * 5, [BLOCK, 3 * BLOCK, 100],
        [2 << 20, BLOCK, 1], [100, BLOCK], [1, 2, 3], [BLOCK, 0, BLOCK], [], [0],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "not-aligned"])
def test_what_is_put_from_pieces_is_one_blob_and_comes_back_to_others(store, sizes, shift) -> None:
    value = scattered(sizes, 1, shift)
    store.put("a", value)
    plain = store.get("a", as_numpy=True)
    assert plain.dtype == np.uint8
    assert plain.shape == (sum(sizes),)
    assert plain.tobytes() == whole(value)
    for others in (sizes, [sum(sizes)], [BLOCK, sum(sizes) - BLOCK], [7, sum(sizes) - 7]):
        if min(others, default=0) < 0:
            continue
        out = scattered(others)
        assert store.get("a", out=out) is out
        assert whole(out) == whole(value)


@property_test
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5).map(lambda blocks: blocks * BLOCK), max_size=5),
            st.integers(0, 2 * BLOCK),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(ENGINES[:3]),
)
def test_many_in_one_transfer_keep_their_checksums_apart(tmp_path_factory, rows, engine) -> None:
    folder = tmp_path_factory.mktemp("scattered")
    with spdk_kv.open(f"file://{folder}/kv", capacity="4 MiB", engine=engine) as store:
        values: dict[str, object] = {
            f"{number}": scattered([*blocks, rest], number)
            for number, (blocks, rest) in enumerate(rows)
        }
        values["plain"] = np.arange(5000)
        store.put_many(values)
        outs = [scattered([*blocks, rest]) for blocks, rest in rows] + [np.zeros(5000, int)]
        store.get_many(list(values), out=outs)
        for value, out in zip(values.values(), outs, strict=True):
            if isinstance(value, Scattered):
                assert whole(out) == whole(value)
        assert np.array_equal(outs[-1], np.arange(5000))


@pytest.mark.parametrize("sizes", [[BLOCK] * 4, [100] * 4], ids=["blocks", "bytes"])
def test_damage_in_any_piece_is_seen_and_named(tmp_path, sizes) -> None:
    with spdk_kv.open(f"file://{tmp_path}/kv", capacity="8 MiB") as store:
        for number in range(len(sizes)):
            values = {"a": scattered(sizes, 1), "b": scattered(sizes, 2), "c": scattered(sizes, 3)}
            store.put_many(values)
            store.flush()
            record = store.catalog.records.find(("b",))[0]
            store.catalog.records.unpin([record])
            with open(tmp_path / "kv" / "data", "r+b", buffering=0) as file:
                file.seek(record.offset + sum(sizes[:number]))
                file.write(b"\xff")
            outs = [scattered(sizes) for _ in values]
            with pytest.raises(CorruptionError, match="'b'"):
                store.get_many(list(values), out=outs)
            with pytest.raises(KeyNotFound):
                store.get("b")
            assert whole(store.get("c", out=outs[2])) == whole(values["c"])


def test_whole_blocks_are_not_copied_and_others_are(tmp_path) -> None:
    with spdk_kv.open(f"file://{tmp_path}/kv", capacity="8 MiB", engine="uring") as store:
        leased = store.staging.stats()
        store.put("a", scattered([64 << 10] * 3, 1))
        store.get("a", out=scattered([64 << 10] * 3))
        assert store.engine.stats()["bounced_nbytes"] == 0
        assert store.staging.stats() == leased
        store.put("b", scattered([100, 64 << 10], 1))
        assert store.staging.stats() != leased


def test_what_does_not_fit_is_refused_before_anything_happens(store) -> None:
    store.put("a", scattered([BLOCK, BLOCK], 1))
    with pytest.raises(ShapeMismatch, match=r"uint8\[4096\].*uint8\[8192\]"):
        store.get("a", out=scattered([BLOCK]))
    store.put("floats", np.zeros(2 * BLOCK // 4, np.float32))
    with pytest.raises(ShapeMismatch, match="float32"):
        store.get("floats", out=scattered([BLOCK, BLOCK]))
    fixed = memory(2 * BLOCK)
    fixed.flags.writeable = False
    with pytest.raises(ShapeMismatch, match="read-only"):
        store.get("a", out=Scattered([fixed]))
    for wrong in (np.zeros(4, np.int32), np.zeros((2, 2), np.uint8), memory(8)[::2]):
        with pytest.raises(ShapeMismatch, match="contiguous array of uint8"):
            Scattered([wrong])


def test_memory_is_held_while_a_transfer_is_under_way(tmp_path) -> None:
    with spdk_kv.open(f"file://{tmp_path}/kv", capacity="8 MiB") as store:
        buffer = bytearray(2 * BLOCK)
        view = np.frombuffer(buffer, np.uint8)
        value = Scattered([view[:BLOCK], view[BLOCK:]])
        store.put_async("a", value).result(60)
        del value, view
        buffer.clear()  # BufferError while anything exports it
        assert store.get("a", as_numpy=True).tobytes() == bytes(2 * BLOCK)
