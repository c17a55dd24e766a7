"""What is read of a sequence is what was appended: layouts, dtypes, slices, heads, prefetches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import spdk_kv
from sequence.helpers import Reference, begun, shape_of
from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    CorruptionError,
    KeyNotFound,
    ShapeMismatch,
)
from spdk_kv.placement import staging
from spdk_kv.sequence import rows as sequence_rows
from spdk_kv.sequence.views import read_all, read_heads
from spdk_kv.store import KVStore
from spdk_kv.types import torch_dtypes
from store.helpers import FILE_ENGINES, bytes_of, check_books, folder_fixture, open_store
from support.waiting import PATIENCE_S

folder = folder_fixture
GRANULARITIES = ("layer", "head")
# Tokens of one 16 KiB chunk and around it, one by one and many at once.
STEPS = [1, 1, 30, 67, 1, 200, 1, 136, 3]


@pytest.fixture(params=[*FILE_ENGINES, "ram"])
def store(request, folder) -> Iterator[KVStore]:
    engine = None if request.param == "ram" else request.param
    where = "ram://" if request.param == "ram" else folder
    with open_store(where, engine=engine, capacity="64 MiB") as opened:
        yield opened
        check_books(opened)


@pytest.fixture
def ram() -> Iterator[KVStore]:
    with open_store("ram://", capacity="64 MiB") as opened:
        yield opened
        check_books(opened)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_appends_of_any_size_read_back(store, granularity):
    sequence, reference = begun(store, granularity)
    reference.check(sequence)  # nothing yet
    for count in STEPS:
        reference.append(sequence, count)
        reference.check(sequence)
    assert sequence.nbytes == 2 * 2 * sum(STEPS) * 240
    for layer in range(2):
        sequence.settle(layer)
    reference.check(sequence)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", sorted(torch_dtypes()))
def test_every_dtype(ram, granularity, dtype):
    sequence, reference = begun(ram, granularity, [300, 5], dtype=dtype, layers=1, head_dim=24)
    reference.check(sequence)
    reference.check(sequence, heads=[2, 0])
    reference.reorder(sequence, [1, 0])
    reference.check(sequence)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("batch", "kv_heads", "head_dim"), [(1, 1, 1), (1, 8, 128), (5, 1, 80), (3, 7, 33)]
)
def test_shapes_whose_rows_fit_chunks_badly(ram, granularity, batch, kv_heads, head_dim):
    sequence, reference = begun(
        ram, granularity, STEPS, batch=batch, kv_heads=kv_heads, head_dim=head_dim
    )
    reference.check(sequence)
    for tokens in (439, 300, 137, 64, 1, 0):
        reference.truncate(sequence, tokens)
        reference.check(sequence)
        reference.append(sequence, 1)
        reference.check(sequence)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "tokens",
    [
        *(slice(0, 0), slice(5), slice(67, 68), slice(60, 300), slice(-3, None), slice(-9, -3)),
        *(slice(400, 100), slice(999, None), slice(438, 440)),
    ],
    ids=str,
)
def test_slices_of_tokens(ram, granularity, tokens):
    sequence, reference = begun(ram, granularity, STEPS)
    reference.check(sequence, tokens=tokens)
    reference.reorder(sequence, [1, 0])
    reference.check(sequence, tokens=tokens)
    sequence.prefetch([0, 1])
    reference.check(sequence, tokens=tokens)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("heads", [[0], [2, 0], [1, 1], [], slice(1, 3), slice(None, None, 2)])
def test_some_heads(store, granularity, heads):
    sequence, reference = begun(store, granularity, STEPS)
    reference.check(sequence, heads=heads)
    reference.check(sequence, heads=heads, tokens=slice(50, 200))
    reference.reorder(sequence, [1, 1])
    reference.check(sequence, heads=heads)


def test_heads_that_lie_apart_are_read_alone(folder):
    with open_store(folder, capacity="64 MiB", policy="direct") as store:
        sequence, reference = begun(store, "head", [600])
        store.flush()
        before = store.stats()["transfers"]["read_nbytes"]
        reference.check_layer(sequence, 0, heads=[1])
        one = store.stats()["transfers"]["read_nbytes"] - before
        assert one > 0
        reference.check_layer(sequence, 0)
        assert store.stats()["transfers"]["read_nbytes"] - before - one == 3 * one


# -- prefetch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("spare", [0, 1, 100])
@pytest.mark.parametrize("more", [0, 1, 2, 90])
def test_appends_between_prefetch_and_read(store, granularity, spare, more):
    sequence, reference = begun(store, granularity, [1, 270])
    sequence.prefetch([0, 1], spare_tokens=spare)
    for _ in range(2):
        if more:
            reference.append(sequence, more)
    reference.check(sequence)
    reference.check(sequence)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_changes_between_prefetch_and_read(store, granularity):
    sequence, reference = begun(store, granularity, [300])
    sequence.prefetch([1, 0])
    reference.truncate(sequence, 130)
    reference.append(sequence, 170)
    reference.check(sequence)
    sequence.prefetch([0])
    sequence.prefetch([0])
    reference.reorder(sequence, [1, 0])
    reference.check(sequence)
    sequence.prefetch([0, 1], first_token=100)
    reference.check(sequence, tokens=slice(100, None))
    sequence.prefetch([0, 1], first_token=100)
    reference.check(sequence, tokens=slice(99, None))
    sequence.prefetch([0, 1], first_token=10_000)
    reference.check(sequence)
    for wrong in ({"first_token": -1}, {"spare_tokens": -1}):
        with pytest.raises(ShapeMismatch):
            sequence.prefetch([0], **wrong)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_prefetch_holds_what_it_was_admitted_for(store, granularity):
    sequence, _ = begun(store, granularity, [400])
    layer = sequence._layers[1]
    for first in (0, 1, 68, 69, 300, 399):
        for spare in (0, 1, 100):
            layer.prefetch(400, 0)  # drops the one before
            expected = layer.reader.prefetch_nbytes(first, spare)
            layer.prefetch(first, spare)
            assert store.paths.ahead.held_nbytes == expected
            assert layer.reader.prefetch_nbytes(first, spare) == 0


def test_a_prefetch_is_read_once_and_not_again(folder):
    with open_store(folder, capacity="64 MiB", policy="direct") as store:
        sequence, reference = begun(store, "layer", [600])
        store.flush()
        sequence.prefetch([0])
        reference.check_layer(sequence, 0)
        before = store.stats()["transfers"]["read_nbytes"]
        sequence.prefetch([1])
        reference.check_layer(sequence, 1)
        assert 0 < store.stats()["transfers"]["read_nbytes"] - before <= 2 * 600 * 240 + 2 * 16384


def test_tensors_that_were_read_do_not_change(ram):
    sequence, reference = begun(ram, "layer", [100])
    k, v = sequence.read(0)
    before = bytes_of(k), bytes_of(v)
    reference.append(sequence, 400)
    reference.truncate(sequence, 0)
    reference.append(sequence, 200)
    sequence.delete()
    assert (bytes_of(k), bytes_of(v)) == before
    k.zero_()  # and they are the caller's


def test_futures(store):
    sequence, reference = begun(store, "layer", [70])
    k, v = reference.tokens(1)
    assert sequence.append_async(0, k, v).result(PATIENCE_S) is None
    k_read, v_read = sequence.read_async(0, tokens=slice(70, 71), heads=[1]).result(PATIENCE_S)
    assert torch.equal(k_read.float().nan_to_num(), k[:, [1]].float().nan_to_num())
    assert v_read.shape == (2, 1, 1, 20)
    with pytest.raises(ShapeMismatch):
        sequence.append_async(0, k, k[:, :, :0]).result(PATIENCE_S)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_wrong_tensors_change_nothing(ram, granularity):
    sequence, reference = begun(ram, granularity, [100])
    good = torch.zeros(2, 3, 4, 20, dtype=torch.bfloat16)
    for k, v in [
        (good[0], good[0]),
        (good[:1], good[:1]),
        (good[:, :2], good[:, :2]),
        (good[..., :19], good[..., :19]),
        (good, good[:, :, :3]),
        (good, good.half()),
        (good.float(), good.float()),
        (good, good[:, :1]),
        (good, good.to_sparse()),
    ]:
        for pair in ((k, v), (v, k)):
            with pytest.raises(ShapeMismatch):
                sequence.append(0, *pair)
    for layer in (-1, 2):
        with pytest.raises(ShapeMismatch, match="layers 0 to 1"):
            sequence.append(layer, good, good)
        with pytest.raises(ShapeMismatch):
            sequence.read(layer)
    reference.check(sequence)
    for wrong in ({"heads": [3]}, {"heads": [-1]}, {"tokens": slice(0, 9, 2)}):
        with pytest.raises(ShapeMismatch):
            sequence.read(0, **wrong)
    for rows in ([0], [0, 2], [0, -1], [0, 1, 1]):
        with pytest.raises(ShapeMismatch):
            sequence.reorder(rows)
    for tokens in (-1, 101):
        with pytest.raises(ShapeMismatch):
            sequence.truncate(tokens)
    reference.check(sequence)
    sequence.append(0, good[:, :, :0], good[:, :, :0])
    reference.check(sequence)


def test_what_changes_nothing_leaves_nothing_to_record(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [10])
        store.flush()
        k, v = reference.tokens(0)
        sequence.append(0, k, v)
        sequence.read(0)
        sequence.prefetch([0])
        assert not sequence.dirty
        reference.check(sequence)


def test_a_weight_is_that_of_k_and_v_of_its_layers(ram):
    sequence, _ = begun(ram, layers=4)
    sequence.set_weight([1, 2], 3)
    weights = [unit.weight for group in ram.paths._scans.groups for unit in group.units]
    assert weights == [1, 1, 3, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("few_cores", [0, 1 << 20])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_are_the_same_however_many_cores_lay_them_out(
    ram, granularity, few_cores, monkeypatch
):
    monkeypatch.setattr(sequence_rows, "_FEW_CORES", few_cores)
    sequence, reference = begun(ram, granularity, [1, 100, 3])
    reference.check(sequence)


def test_only_a_read_to_a_device_asks_for_a_gpu(ram, monkeypatch):
    asked = []
    monkeypatch.setattr(staging, "_cuda_runtime", lambda: asked.append("a GPU"))
    sequence, reference = begun(ram, "layer", [100])
    reference.check(sequence)
    ram.put("blob", torch.zeros(10))
    ram.get("blob")
    assert asked == []
    sequence.read(0, device="cpu")
    assert asked == ["a GPU"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_max_tokens_is_the_most(ram, granularity):
    sequence, reference = begun(ram, granularity, [599])
    with pytest.raises(CapacityError, match="max_tokens 600"):
        reference.append(sequence, 2, layer=0)
    reference.append(sequence, 1)
    with pytest.raises(CapacityError):
        reference.append(sequence, 1, layer=1)
    reference.check(sequence)


def test_an_existing_sequence_is_the_same_object_and_must_match(ram):
    sequence, _ = begun(ram, "head", [10])
    assert ram.sequence("s") is sequence
    assert ram.sequence("s", shape_of()) is sequence
    with pytest.raises(ShapeMismatch):
        ram.sequence("s", shape_of(layers=3))
    with pytest.raises(ShapeMismatch, match="granularity"):
        ram.sequence("s", granularity="layer")
    with pytest.raises(KeyNotFound):
        ram.sequence("other")
    with pytest.raises(ShapeMismatch, match="granularity"):
        ram.sequence("other", shape_of(), granularity="page")
    assert ram.sequences() == ["s"]


def test_a_sequence_larger_than_the_store_is_refused_and_leaves_nothing(ram):
    with pytest.raises(CapacityError):
        ram.sequence("huge", shape_of(max_tokens=1_000_000))
    assert ram.sequences() == []
    assert ram.stats()["used_nbytes"] == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_deleting_gives_the_space_back_and_ends_all_use(store, granularity):
    free = store.stats()["free_nbytes"]
    sequence, reference = begun(store, granularity, [300])
    store.flush()
    assert store.stats()["free_nbytes"] < free
    sequence.prefetch([0])
    sequence.delete()
    sequence.delete()
    for call in (
        lambda: sequence.read(0),
        lambda: sequence.append(0, *reference.tokens(1)),
        lambda: sequence.truncate(0),
        lambda: sequence.reorder([0, 1]),
        lambda: sequence.prefetch([0]),
    ):
        with pytest.raises(ClosedError):
            call()
    store.flush()
    assert store.stats()["free_nbytes"] == free
    again, reference = begun(store, granularity, [5])
    assert again is not sequence
    reference.check(again)


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_threads_on_different_layers(folder, granularity):
    shape = shape_of(layers=8)
    with open_store(folder, capacity="64 MiB", flush_interval_s=0.01) as store:
        sequence = store.sequence("s", shape, granularity=granularity)
        references = [Reference(shape, seed=1000 * number) for number in range(8)]

        def work(layer: int) -> None:
            reference = references[layer]
            for count in [1, 40, 1, 1, 100, 7, 90, 1]:
                reference.append(sequence, count, layer=layer)
                sequence.prefetch([layer])
                reference.check_layer(sequence, layer)
            reference.truncate(sequence, 77, layer=layer)
            reference.append(sequence, 30, layer=layer)
            reference.check_layer(sequence, layer)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    with open_store(folder, capacity=None) as store:
        for layer, reference in enumerate(references):
            reference.check_layer(store.sequence("s"), layer)


def test_deleting_while_others_read_gives_tokens_or_a_typed_error(folder):
    # Unverified, so that bytes of the next owner of the extents would be seen.
    with open_store(folder, capacity="4 MiB", verify=False) as store:
        for turn in range(12):
            sequence, reference = begun(store, "layer", [600])
            store.flush()

            def read(sequence=sequence, reference=reference) -> int:
                count = 0
                while True:
                    try:
                        reference.check_layer(sequence, count % 2)
                    except ClosedError:
                        return count
                    count += 1

            with ThreadPoolExecutor(3) as threads:
                readers = [threads.submit(read) for _ in range(3)]
                sequence.delete()
                for i in range(4):
                    store.put(f"{turn} {i}", torch.full((900_000,), i, dtype=torch.uint8))
                for reader in readers:
                    reader.result(PATIENCE_S)
            for key in store.keys(""):
                store.delete(key)


def test_a_layer_of_a_deleted_sequence_does_nothing_more(ram):
    # A thread may have come to it before it was deleted, and wait for its lock.
    sequence, reference = begun(ram, "layer", [100])
    layer, (k, v) = sequence._layers[0], reference.tokens(100)
    sequence.delete()
    for call in (
        lambda: layer.append(k, v),
        layer.settle,
        lambda: layer.truncate(0),
        lambda: layer.reorder(torch.tensor([1, 0]).numpy()),
        layer.flush,
        lambda: read_all(layer, 0, 100),
        lambda: read_heads(layer, 0, 100, [0]),
    ):
        with pytest.raises(ClosedError):
            call()


def test_a_flipped_bit_of_a_unit_is_found_and_counted(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [500])
        store.flush()
        offset = next(sequence._layers[1].contents.ranges(1, 0, 1))[0]
        with open(folder / "data", "r+b") as data:
            data.seek(offset + 20_000)
            byte = data.read(1)[0]
            data.seek(offset + 20_000)
            data.write(bytes([byte ^ 4]))
        for options in ({}, {"heads": [0]}, {"tokens": slice(80, 90)}):
            with pytest.raises(CorruptionError, match="layer 1"):
                sequence.read(1, **options)
        assert store.stats()["corruptions"] == 3
        # The rest of the layer, and the other one, are whole.
        reference.check_layer(sequence, 1, tokens=slice(0, 60))
        reference.check_layer(sequence, 1, tokens=slice(140, None))
        reference.check_layer(sequence, 0)
        # Cutting within the damaged chunk needs it: refused, and nothing is changed by that.
        with pytest.raises(CorruptionError):
            sequence.truncate(100, layer=1)
        assert sequence.tokens(1) == 500
        reference.check_layer(sequence, 1, tokens=slice(140, None))
        reference.truncate(sequence, 60, layer=1)
        reference.append(sequence, 100, layer=1)
        reference.check(sequence)


def test_a_sequence_of_a_null_store_has_the_shapes():
    with open_store("null://", capacity="64 MiB") as store:
        sequence = store.sequence("s", shape_of())
        assert isinstance(sequence, spdk_kv.Sequence)
        kv = torch.zeros(2, 3, 100, 20, dtype=torch.bfloat16)
        sequence.append(0, kv, kv)
        assert sequence.read(0)[0].shape == kv.shape
