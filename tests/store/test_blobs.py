"""Blobs come back as they were put: dtypes, shapes, strides, sizes, destinations, engines."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv.errors import CorruptionError, KeyNotFound, ShapeMismatch
from spdk_kv.store import KVStore, mapped
from spdk_kv.types import torch_dtypes
from store.helpers import (
    FILE_ENGINES,
    assert_same,
    check_books,
    extent_of,
    folder_fixture,
    noise,
    open_store,
    reopen,
    tensor_of,
)
from support.rounds import examples
from support.waiting import PATIENCE_S

folder = folder_fixture

ENGINES = (*FILE_ENGINES, "ram")
DTYPES = sorted(torch_dtypes())
NUMPY_DTYPES = ["bool", "complex64", "complex128", "float16", "float32", "float64"] + [
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
]


@pytest.fixture(scope="module", params=ENGINES)
def store(request, tmp_path_factory) -> Iterator[KVStore]:
    """One store per engine for all tests of this file that only put and get."""
    where = "ram://" if request.param == "ram" else tmp_path_factory.mktemp("store")
    engine = None if request.param == "ram" else request.param
    with open_store(where, engine=engine, capacity="64 MiB") as opened:
        yield opened
        check_books(opened)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_torch_comes_back_with_its_bits(store, dtype):
    tensor = tensor_of(torch_dtypes()[dtype], (3, 5, 7))
    store.put("k", tensor)
    found = store.get("k")
    assert_same(found, tensor)
    out = torch.empty_like(tensor)
    assert store.get("k", out=out) is out
    assert_same(out, tensor)


def test_the_dtypes_are_all_that_torch_has():
    # A dtype that torch_dtypes() overlooked would be refused without need.
    named = {"bfloat16", "bool", "complex32", "complex64", "float16", "float8_e4m3fn"}
    assert named | {"float8_e5m2", "uint16", "uint32", "uint64", "int8"} <= set(DTYPES)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_arrays_go_in_and_out(store, dtype):
    array = tensor_of(torch_dtypes()[dtype], (4, 9)).numpy()
    store.put("k", array)
    found = store.get("k", as_numpy=True)
    assert isinstance(found, np.ndarray)
    assert_same(found, array)
    assert_same(store.get("k"), torch.from_numpy(array.copy()))
    out = np.empty_like(array)
    assert store.get("k", out=out) is out
    assert_same(out, array)


def test_a_dtype_that_numpy_lacks_is_refused_as_numpy_only(store):
    tensor = tensor_of(torch.bfloat16, (4,))
    store.put("k", tensor)
    with pytest.raises(ShapeMismatch, match="bfloat16"):
        store.get("k", as_numpy=True)
    assert_same(store.get("k"), tensor)
    check_books(store)  # nothing stays pinned by the refusal


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(3, 3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.empty(3, device="meta"),
        np.array(["a"]),
        np.array([object()]),
        np.zeros(3, ">i4"),
        np.zeros(3, [("a", "i4")]),
        np.zeros(3, "datetime64[s]"),
        [1, 2, 3],
        b"bytes",
    ],
    ids=lambda bad: str(getattr(bad, "dtype", type(bad).__name__)),
)
def test_what_has_no_plain_bytes_is_refused_before_any_io(store, bad):
    store.put("k", noise(100))
    used = store.stats()["used_nbytes"]
    with pytest.raises(ShapeMismatch):
        store.put("k", bad)
    with pytest.raises(ShapeMismatch):
        store.put_many({"other": noise(10), "k": bad})
    assert_same(store.get("k"), noise(100))
    assert not store.contains("other")
    assert store.stats()["used_nbytes"] == used


STRIDED = {
    "transposed": lambda t: t.t(),
    "sliced": lambda t: t[::2, 1::3],
    "expanded": lambda t: t[:1].expand(20, -1),
    "offset": lambda t: t.reshape(-1)[7:],
    "flipped": lambda t: t.flip(0),
    "0-d": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[:, 3:3],
}


@pytest.mark.parametrize("view", STRIDED)
def test_views_are_stored_as_what_they_show(store, view):
    tensor = STRIDED[view](torch.arange(600, dtype=torch.int32).reshape(20, 30))
    store.put("k", tensor)
    assert_same(store.get("k"), tensor)
    array = tensor.numpy()
    store.put("k", array)
    assert_same(store.get("k", as_numpy=True), np.array(array))
    out = np.zeros(array.shape, array.dtype)
    assert_same(store.get("k", out=out), np.array(array))


@pytest.mark.parametrize("step", [-1, -2])
def test_numpy_views_with_negative_strides(store, step):
    array = np.arange(100, dtype=np.uint16)[::step]
    store.put("k", array)
    assert_same(store.get("k", as_numpy=True), array)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_lazy_conjugates_and_negatives_are_stored_as_their_values(store, dtype):
    tensor = tensor_of(torch.float32, (50, 2)).nan_to_num().to(dtype.to_real()).contiguous()
    tensor = torch.view_as_complex(tensor)
    conjugate = tensor.conj()
    assert conjugate.is_conj()
    store.put("k", conjugate)
    assert torch.equal(store.get("k"), conjugate.resolve_conj())
    negative = conjugate.imag
    assert negative.is_neg()
    store.put("k", negative)
    assert torch.equal(store.get("k"), negative.resolve_neg())
    # And as destinations: the values count, not the bits under the lazy flag.
    store.put("k", tensor)
    out = torch.zeros_like(tensor).conj()
    assert torch.equal(store.get("k", out=out), tensor)


def test_a_tensor_that_requires_grad_is_stored_as_its_values(store):
    weights = torch.nn.Parameter(torch.randn(10))
    store.put("k", weights)
    assert torch.equal(store.get("k"), weights.detach())
    with pytest.raises(ShapeMismatch, match="grad"):
        store.get("k", out=weights)


SIZES = [1, 511, 512, 4095, 4096, 4097, 65535, 65536, 65537, 3 << 20, (3 << 20) + 1]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("nbytes", SIZES)
def test_sizes_and_addresses_off_every_boundary(store, nbytes, shift):
    tensor = noise(nbytes + shift, nbytes)[shift:]
    store.put("k", tensor)
    assert_same(store.get("k"), tensor)
    out = torch.zeros(nbytes + shift + 64, dtype=torch.uint8)
    store.get("k", out=out[shift : shift + nbytes])
    assert_same(out[shift : shift + nbytes], tensor)
    assert not out[:shift].any()
    assert not out[shift + nbytes :].any()


# -- several at once, and asynchronously ----------------------------------------------------------


def many() -> dict[str, torch.Tensor]:
    tensors = {f"k{i}": noise(i * 777, i) for i in range(12)}  # k0 is empty
    tensors["0-d"] = torch.tensor(1.5, dtype=torch.bfloat16)
    tensors["no rows"] = torch.empty(0, 5, dtype=torch.float16)
    return tensors


def test_many_in_one_transfer(store):
    tensors = many()
    before = store.stats()["transfers"]["transfers"]
    store.put_many(tensors)
    found = store.get_many(reversed(tensors))
    assert store.stats()["transfers"]["transfers"] <= before + 2
    for tensor, expected in zip(found, reversed(tensors.values()), strict=True):
        assert_same(tensor, expected)
    outs = [torch.empty_like(tensor) for tensor in tensors.values()]
    assert store.get_many(tensors, out=outs)[3] is outs[3]
    for tensor, expected in zip(outs, tensors.values(), strict=True):
        assert_same(tensor, expected)


def test_a_key_may_be_asked_for_twice_at_once(store):
    store.put_many({"a": noise(9000, 1), "b": noise(0)})
    for tensor in (found := store.get_many(["a", "b", "a"]))[::2]:
        assert_same(tensor, noise(9000, 1))
    found[0].zero_()
    assert_same(found[2], noise(9000, 1))  # each its own memory
    check_books(store)


def test_nothing_at_all_is_fine(store):
    store.put_many({})
    assert store.get_many([]) == []
    assert store.put_many_async({}).result(PATIENCE_S) is None
    assert store.get_many_async([]).result(PATIENCE_S) == []


def test_futures_carry_results_and_errors(store):
    tensors = many()
    assert store.put_many_async(tensors).result(PATIENCE_S) is None
    assert store.put_async("one", noise(5000, 5)).result(PATIENCE_S) is None
    assert_same(store.get_async("one").result(PATIENCE_S), noise(5000, 5))
    for tensor, expected in zip(
        store.get_many_async(tensors).result(PATIENCE_S), tensors.values(), strict=True
    ):
        assert_same(tensor, expected)
    out = torch.empty(5000, dtype=torch.uint8)
    assert store.get_async("one", out=out).result(PATIENCE_S) is out
    assert_same(out, noise(5000, 5))
    assert store.flush_async().result(PATIENCE_S) is None
    with pytest.raises(KeyNotFound):
        store.get_async("missing")
    with pytest.raises(ShapeMismatch):
        store.get_async("one", out=torch.empty(1))
    check_books(store)


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more")])
def test_the_first_five_that_are_missing_are_named(store, count, more):
    with pytest.raises(KeyNotFound) as missing:
        store.get_many([f"lost {number}" for number in range(count)])
    assert str(missing.value).endswith(f"'lost 3', 'lost 4'{more}")


def test_futures_serve_asyncio(store):
    async def both() -> list[torch.Tensor]:
        await asyncio.wrap_future(store.put_async("a", noise(100_000, 1)))
        gets = [asyncio.wrap_future(store.get_async("a")) for _ in range(5)]
        return await asyncio.gather(*gets)

    for tensor in asyncio.run(both()):
        assert_same(tensor, noise(100_000, 1))


def test_a_future_s_callback_may_use_the_store(store):
    # Which may run on another thread, or at once where the future is done.
    store.put("a", noise(100_000, 1))
    found, futures = Queue(), Queue()
    future = store.get_async("a")
    future.add_done_callback(lambda _: futures.put(store.get_async("a")))
    future.add_done_callback(lambda _: found.put(store.get("a")))
    future.result(PATIENCE_S)
    assert_same(futures.get(timeout=PATIENCE_S).result(PATIENCE_S), found.get(timeout=PATIENCE_S))


# -- a property, over the engines -----------------------------------------------------------------

blobs = st.dictionaries(
    st.text(max_size=20),
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 60), max_size=4).map(tuple),
        st.booleans(),
        st.integers(0, 2**32 - 1),
    ),
    max_size=5,
)


@given(blobs)
@settings(max_examples=examples(40))
def test_whatever_is_put_comes_back(store, chosen):
    tensors = {}
    for key, (dtype, shape, transposed, seed) in chosen.items():
        shape = shape if np.prod(shape, dtype=np.int64) < 1 << 16 else shape[:2]
        tensor = tensor_of(torch_dtypes()[dtype], shape, seed)
        tensors[key] = tensor.mT if transposed and tensor.dim() > 1 else tensor
    store.put_many(tensors)
    for found, tensor in zip(store.get_many(tensors), tensors.values(), strict=True):
        assert_same(found, tensor)
    for key, tensor in tensors.items():
        out = torch.empty_like(tensor)
        assert_same(store.get(key, out=out), tensor)
        assert store.delete(key)
        assert not store.delete(key)


# -- life times -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True, "page by page"])
def test_a_tensor_outlives_overwriting_deleting_closing_and_the_next_owner(
    folder, mmap, monkeypatch
):
    if mmap == "page by page":
        monkeypatch.setattr(
            mapped, "_MADV_POPULATE_WRITE", 9999
        )  # which a kernel before 5.14 has not
    engine = "pagecache" if mmap else None
    store = open_store(folder, engine=engine, mmap=bool(mmap))
    keys = ["overwritten", "deleted", "closed"]
    store.put_many({key: noise(300_000, i) for i, key in enumerate(keys)})
    found = store.get_many(keys) if not mmap else [store.get(key) for key in keys]
    store.put("overwritten", noise(300_000, 7))
    store.delete("deleted")
    store.flush()
    for i in range(40):  # over everything that is free, and evicting what may be
        store.put(f"new{i}", noise(400_000, 100 + i))
    for i, tensor in enumerate(found):
        assert_same(tensor, noise(300_000, i))
    store.close()
    with reopen(folder, engine=engine) as store:
        for i in range(40):
            store.put(f"newer{i}", noise(400_000, 200 + i))
    for i, tensor in enumerate(found):
        assert_same(tensor, noise(300_000, i))


def test_writing_to_a_tensor_does_not_reach_the_store(folder):
    with open_store(folder, engine="pagecache", mmap=True) as store:
        store.put("k", noise(10_000))
        for _ in range(2):
            store.get("k").zero_()
            assert_same(store.get("k"), noise(10_000))


def test_a_mapped_blob_is_the_page_cache_itself_and_pins_its_extent(folder):
    with open_store(folder, engine="pagecache", mmap=True, capacity="4 MiB") as store:
        store.put("k", noise(1 << 20, 1))
        found = store.get("k")
        assert store.stats()["transfers"]["read_nbytes"] == 0
        assert store.stats()["staging"]["leased_nbytes"] == 0
        offset, _ = extent_of(store, "k")
        store.delete("k")
        store.flush()
        assert offset in store.catalog.records.extents.allocator._used
        del found
        gc.collect()
        store.put("other", noise(10, 1))
        assert (
            offset not in store.catalog.records.extents.allocator._used
            or extent_of(store, "other")[0] == offset
        )
        assert_same(store.get("other"), noise(10, 1))
        store.put("empty", noise(0))
        assert_same(store.get("empty"), noise(0))
        with pytest.raises(TypeError, match="a key is a str"):
            store.get(1)


def test_mmap_is_for_the_pagecache_engine_and_leaves_no_lock_behind(folder):
    with pytest.raises(ValueError, match="pagecache"):
        open_store(folder, engine="threads", mmap=True)
    open_store(folder).close()


def test_checksums_are_kept_by_a_store_that_does_not_check_them(folder):
    with open_store(folder, verify=False) as store:
        store.put("good", noise(50_000, 1))
        store.put("bad", noise(50_000, 2))
        assert_same(store.get("good"), noise(50_000, 1))
        offset, _ = extent_of(store, "bad")
    with open(folder / "data", "r+b") as data:
        data.seek(offset + 100)
        data.write(b"other bytes")
    with reopen(folder, verify=True) as store:
        assert_same(store.get("good"), noise(50_000, 1))
        with pytest.raises(CorruptionError):
            store.get("bad")


def test_get_puts_tensors_on_a_device(store):
    store.put("k", torch.arange(10))
    assert_same(store.get("k", device="cpu"), torch.arange(10))
    assert store.get("k", device="meta").is_meta


def test_null_keeps_no_bytes_but_goes_through_the_motions():
    with open_store("null://") as store:
        store.put("k", torch.ones(1000))
        assert store.get("k").shape == (1000,)
        with pytest.raises(KeyNotFound):
            store.get("other")


def test_paths_that_are_not_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with open_store("./cache") as store:
        store.put("k", noise(10))
    with reopen(tmp_path / "cache") as store:
        assert_same(store.get("k"), noise(10))
    (tmp_path / "cache" / "data").unlink()
