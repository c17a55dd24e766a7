"""A get into the caller's memory: the bytes go there, to nowhere else, or nothing is touched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from spdk_kv.errors import KeyNotFound, ShapeMismatch
from spdk_kv.store import KVStore
from store.helpers import (
    FILE_ENGINES,
    bytes_of,
    check_books,
    noise,
    open_store,
)

ENGINES = (*FILE_ENGINES, "ram")


@pytest.fixture(scope="module", params=ENGINES)
def store(request, tmp_path_factory) -> Iterator[KVStore]:
    """One store per engine for all tests of this file that only put and get."""
    where = "ram://" if request.param == "ram" else tmp_path_factory.mktemp("store")
    engine = None if request.param == "ram" else request.param
    with open_store(where, engine=engine, capacity="64 MiB") as opened:
        yield opened
        check_books(opened)


class Canaried:
    """Memory amid canaries: what lies around it, and it itself, is checked byte by byte."""

    def __init__(self, nbytes: int, shift: int) -> None:
        self.memory = np.full(nbytes + shift + 8192, 0xA5, np.uint8)
        self.shift, self.nbytes = shift + 4096, nbytes

    @property
    def inside(self) -> np.ndarray:
        return self.memory[self.shift : self.shift + self.nbytes]

    def assert_canaries(self) -> None:
        around = np.delete(self.memory, slice(self.shift, self.shift + self.nbytes))
        assert (around == 0xA5).all()

    def assert_untouched(self) -> None:
        assert (self.memory == 0xA5).all()


@pytest.mark.parametrize("shift", [0, 1, 2048])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_out_gets_the_bytes_and_nothing_around_it(store, kind, shift):
    tensor = noise(70_001)
    store.put("k", tensor)
    place = Canaried(70_001, shift)
    out = torch.from_numpy(place.inside) if kind == "torch" else place.inside
    assert store.get("k", out=out) is out
    assert place.inside.tobytes() == bytes_of(tensor)
    place.assert_canaries()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_out_that_is_not_contiguous_is_filled_through_its_strides(store, kind):
    tensor = torch.arange(3000, dtype=torch.int32).reshape(50, 60)
    store.put("k", tensor)
    whole = torch.full((60, 100), -1, dtype=torch.int32)
    out = whole.t()[::2]
    store.get("k", out=out if kind == "torch" else out.numpy())
    assert torch.equal(out, tensor)
    assert (whole.t()[1::2] == -1).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out[:-1],
        lambda out: out.reshape(2, -1),
        lambda out: out.view(np.int8),
        lambda out: out.view(np.uint16),
    ],
    ids=["shorter", "shape", "sign", "width"],
)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_out_of_another_shape_or_dtype_is_refused_and_untouched(store, kind, spoil):
    store.put("k", noise(6000))
    place = Canaried(6000, 1 if kind == "numpy" else 0)
    out = spoil(place.inside)
    reads = store.stats()["transfers"]["read_nbytes"]
    with pytest.raises(ShapeMismatch, match="is stored"):
        store.get("k", out=torch.from_numpy(out) if kind == "torch" else out)
    place.assert_untouched()
    assert store.stats()["transfers"]["read_nbytes"] == reads  # before any I/O


def test_out_that_cannot_be_written_is_refused_and_untouched(store):
    store.put("k", noise(6000))
    place = Canaried(6000, 0)
    fixed = place.inside
    fixed.flags.writeable = False
    with pytest.raises(ShapeMismatch, match="read-only"):
        store.get("k", out=fixed)
    with pytest.raises(ShapeMismatch, match="share memory"):
        store.get("k", out=torch.empty(1, dtype=torch.uint8).expand(6000))
    shared = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (6000,), (0,))
    with pytest.raises(ShapeMismatch, match="share memory"):
        store.get("k", out=shared)
    with pytest.raises(ShapeMismatch, match="out"):
        store.get("k", out=bytearray(6000))
    with pytest.raises(ShapeMismatch, match="out"):
        store.get("k", out=torch.empty(6000, dtype=torch.uint8), device="cpu")
    with pytest.raises(ShapeMismatch, match="2 outs for 1 keys"):
        store.get_many(["k"], out=[place.inside, place.inside])
    place.assert_untouched()
    check_books(store)


def test_out_beside_a_missing_key_is_untouched(store):
    store.put("k", noise(6000))
    places = [Canaried(6000, 0), Canaried(6000, 0)]
    with pytest.raises(KeyNotFound, match="missing"):
        store.get_many(["k", "missing"], out=[place.inside for place in places])
    for place in places:
        place.assert_untouched()
    check_books(store)
