"""Sequences of tensors on a device that is reached over a link: the bytes, and what goes wrong."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import spdk_kv
from link.helpers import CUDA, DEVICES, EMULATED, Linked, linked_store
from paths.helpers import PLENTY, paths, resident_nbytes, set_available, units
from sequence.helpers import Reference, shape_of
from spdk_kv.errors import CorruptionError, DeviceError
from spdk_kv.types import torch_dtypes
from store.helpers import assert_same, flip, folder_fixture
from support.waiting import PATIENCE_S

folder = folder_fixture
GRANULARITIES = ("layer", "head", "token")
# Tokens of one 16 KiB chunk and around it, one by one and many at once.
STEPS = [1, 1, 30, 67, 1, 210, 1, 136, 3]
WAYS = {
    "uring": {"engine": "uring"},
    "both paths": {"policy": "paper", "memory": "150 KiB"},
    "page cache": {"policy": "pagecache"},
    "pagecache engine": {"engine": "pagecache"},
    "ram": {},
}


@pytest.fixture(params=DEVICES)
def device(request) -> Any:
    return request.param


@pytest.fixture(params=WAYS)
def linked(request, folder, device) -> Iterator[Linked]:
    where = "ram://" if request.param == "ram" else folder
    with linked_store(where, device, **WAYS[request.param]) as found:
        yield found


@pytest.fixture
def ram(device) -> Iterator[Linked]:
    with linked_store("ram://", device) as found:
        yield found


def begun(linked: Linked, granularity: str, steps=(), **changed):
    shape = shape_of(**changed)
    sequence = linked.store.sequence("s", shape, granularity=granularity)
    reference = Reference(shape, device=linked.device)
    for count in steps:
        reference.append(sequence, count)
    return sequence, reference


def written(linked: Linked, granularity: str, steps=(), **changed):
    """As :func:`begun`, and nothing is on its way to the drive any more."""
    sequence, reference = begun(linked, granularity, steps, **changed)
    for layer in range(sequence.shape.layers):
        sequence.settle(layer)
    return sequence, reference


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_appends_of_any_size_read_back(linked, granularity):
    sequence, reference = begun(linked, granularity)
    reference.check(sequence, device=linked.device)  # nothing yet
    for count in STEPS:
        reference.append(sequence, count)
        reference.check(sequence, device=linked.device)
    for layer in range(2):
        sequence.settle(layer)
    reference.check(sequence, device=linked.device)
    reference.check(sequence)  # and for the host
    to_device, from_device = linked.carried()
    assert from_device >= 2 * 210 * 480 // 16384 * 16384
    assert to_device > from_device
    found = linked.store.stats()["pipelines"]
    assert {one["engine"] for one in found} == {e.name for e in linked.store.paths.routes.engines}
    assert found[0]["device"].startswith(linked.device)
    assert any(one.get("read", {}).get("segment_nbytes", 0) >= 16384 for one in found)


def test_both_paths_read_over_the_link(folder, device):
    with linked_store(folder, device, **WAYS["both paths"]) as linked:
        sequence, reference = begun(linked, "layer", [600])
        linked.store.flush()  # what is still being written is read from memory
        for _ in range(3):
            reference.check(sequence, device=linked.device)
        seen = linked.store.stats()["residency"]
        assert 0 < seen["cached_units"] < seen["units"]
        for engine in linked.store.paths.routes.engines:
            assert engine.stats()["to_device_nbytes"] > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", sorted(torch_dtypes()))
def test_every_dtype(ram, granularity, dtype):
    sequence, reference = begun(ram, granularity, [300, 5], dtype=dtype, layers=1, head_dim=24)
    reference.check(sequence, device=ram.device)
    reference.check(sequence, heads=[2, 0], device=ram.device)
    reference.reorder(sequence, [1, 0])
    reference.check(sequence, device=ram.device)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("heads", [None, [0], [2, 0], [1, 1], []])
@pytest.mark.parametrize("tokens", [None, slice(0, 0), slice(60, 300), slice(-3, None)], ids=str)
def test_some_tokens_and_heads(ram, granularity, heads, tokens):
    sequence, reference = begun(ram, granularity, STEPS)
    reference.check(sequence, heads=heads, tokens=tokens, device=ram.device)
    reference.reorder(sequence, [1, 1])
    reference.check(sequence, heads=heads, tokens=tokens, device=ram.device)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("more", [0, 1, 90])
def test_what_is_read_ahead_goes_where_the_last_read_went(linked, granularity, more):
    sequence, reference = begun(linked, granularity, [1, 270])
    sequence.settle(0)
    sequence.settle(1)
    reference.check_layer(sequence, 0, device=linked.device)
    before = linked.carried()[0]
    sequence.prefetch([1], spare_tokens=1)
    reader = sequence._layers[1].reader
    assert reader.prefetched.reading.buffer.gpu is not None
    for part in reader.prefetched.reading.parts:
        part.engine.wait(part.transfer)
    assert linked.carried()[0] > before
    if more:
        reference.append(sequence, more)
    reference.check(sequence, device=linked.device)
    # Read ahead for the host, taken for the device; and the other way round.
    reference.check(sequence)
    sequence.prefetch([0])
    reference.check(sequence, device=linked.device)
    sequence.prefetch([0])
    reference.check(sequence)


def test_layers_are_read_ahead_unasked(linked):
    sequence, reference = begun(linked, "layer", [300], layers=4)
    for _ in range(4):
        reference.check(sequence, device=linked.device)
    assert any(layer.reader.prefetched.reading for layer in sequence._layers)
    reference.truncate(sequence, 150)
    reference.check(sequence, device=linked.device)
    reference.append(sequence, 77)
    reference.reorder(sequence, [1, 0])
    reference.check(sequence, device=linked.device)


def test_a_full_device_holds_up_no_append_and_no_read_ahead(linked, monkeypatch):
    sequence, reference = begun(linked, "layer", [300], layers=4)
    for _ in range(2):
        reference.check(sequence, device=linked.device)
    device = linked.store.links.gpu(linked.device)

    def full(nbytes: int) -> Any:
        raise torch.cuda.OutOfMemoryError(f"no {nbytes} bytes")

    with monkeypatch.context() as patch:
        patch.setattr(device, "allocate", full)
        linked.store.flush()  # what was appended before may still be on its way
        before = linked.carried()[1]
        reference.append(sequence, 210)
        assert linked.carried()[1] == before
        sequence.prefetch([2, 0])
        with pytest.raises(torch.cuda.OutOfMemoryError):
            sequence.read(3, device=linked.device)
        reference.check(sequence)
    reference.check(sequence, device=linked.device)


def test_sequences_survive_and_restore(folder, device):
    with linked_store(folder, device) as linked:
        _, reference = begun(linked, "layer", STEPS)
        linked.store.flush()
    with linked_store(folder, device, capacity=None) as linked:
        reference.check(linked.store.sequence("s"), device=linked.device)


def test_futures(ram):
    sequence, reference = begun(ram, "layer", [300])
    k, v = (tensor.to(ram.device) for tensor in reference.tokens(100))
    sequence.append_async(0, k, v).result(PATIENCE_S)
    found = sequence.read_async(0, device=ram.device).result(PATIENCE_S)
    assert_same(found[0][:, :, 300:], k)
    assert_same(found[1][:, :, 300:], v)


def test_a_damaged_chunk_is_never_returned(folder, device):
    with linked_store(folder, device, policy="direct") as linked:
        sequence, reference = begun(linked, "layer", [600])
        linked.store.flush()
        ((offset, _),) = sequence._layers[1].contents.ranges(1, 20000, 20001)
        flip(linked.store.engine.where, offset)
        reference.check_layer(sequence, 0, device=linked.device)
        for _ in range(2):
            with pytest.raises(CorruptionError, match="CRC32C"):
                sequence.read(1, device=linked.device)
        assert linked.store.stats()["corruptions"] == 2


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("ahead", [False, True])
def test_in_order_with_torchs_streams(folder, device, ahead):
    """Without a synchronisation: what is queued before comes before, and after, after; also where
    another stream takes what was read ahead."""
    with linked_store(folder, device) as linked:
        sequence, reference = begun(linked, "layer", [300])
        reference.check(sequence, device=device)
        streams = [torch.cuda.Stream() for _ in range(2)]
        for _ in range(20):
            with torch.cuda.stream(streams[0]):
                k, v = (tensor.to(device) for tensor in reference.tokens(200))
                torch.cuda._sleep(2_000_000)
                k, v = k.clone(), v.clone()  # may still be computed when it is appended
                sequence.append(0, k, v)
                if ahead:
                    sequence.prefetch([0])
            with torch.cuda.stream(streams[1]):
                read = [tensor.clone() for tensor in sequence.read(0, device=device)]
                torch.cuda._sleep(2_000_000)
            assert_same(read[0][:, :, 300:], k)
            assert_same(read[1][:, :, 300:], v)
            sequence.truncate(300, layer=0)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_copy_that_fails_gives_a_typed_error_and_no_bytes(number, at_once):
    with linked_store("ram://", *EMULATED.values) as linked:
        sequence, reference = written(linked, "layer", [600])
        reference.check(sequence)
        linked.link.fail(number, at_once=at_once)
        with pytest.raises(DeviceError, match="to the GPU"):
            sequence.read(0, device=linked.device)
        reference.check(sequence, device=linked.device)
        # One that was read ahead says so when it is taken.
        linked.link.fail(number, at_once=at_once)
        sequence.prefetch([0])
        with pytest.raises(DeviceError, match="to the GPU"):
            sequence.read(0, device=linked.device)
        reference.check(sequence, device=linked.device)


def test_a_copy_that_fails_on_an_append_fails_its_layer(folder):
    with linked_store(folder, *EMULATED.values) as linked:
        sequence, reference = written(linked, "layer", [300])
        reference.check(sequence)
        linked.link.fail(2)
        k, v = reference.tokens(200)
        sequence.append(1, k, v)
        with pytest.raises(DeviceError, match="from the GPU"):
            sequence.settle(1)
        for _ in range(2):
            with pytest.raises(DeviceError, match="from the GPU"):
                sequence.read(1, device=linked.device)
        reference.check_layer(sequence, 0, device=linked.device)
        sequence.delete()


def test_the_other_path_delivers_what_one_cannot(folder):
    with linked_store(folder, *EMULATED.values, **WAYS["both paths"]) as linked:
        sequence, reference = written(linked, "layer", [600])
        reference.check(sequence)
        for number in range(1, 8):
            linked.link.fail(number)
            reference.check_layer(sequence, 0, device=linked.device)
        assert linked.store.stats()["residency"]["taken_over_nbytes"] > 0


def test_what_was_read_ahead_is_dropped_in_flight(folder):
    """Memory of the device stays until the last copy into it is over."""
    with linked_store(folder, *EMULATED.values, policy="direct") as linked:
        sequence, reference = written(linked, "layer", [600])
        reference.check(sequence, device=linked.device)
        linked.link.pause()
        try:
            copies = linked.link.stats()["copies"]
            sequence.prefetch([0])
            buffer = sequence._layers[0].reader.prefetched.reading.buffer
            memory = buffer._memory.tensor.untyped_storage()
            reference_to_memory = memory._weak_ref()
            del buffer, memory
            until = time.monotonic() + PATIENCE_S
            while linked.link.stats()["copies"] == copies and time.monotonic() < until:
                time.sleep(0.001)
            reference.truncate(sequence, 500)
            assert sequence._layers[0].reader.prefetched.reading is None
            gc.collect()
            assert not _expired(reference_to_memory)
            # Dropped with the sequence, too.
            sequence.prefetch([0])
        finally:
            resumed = threading.Timer(0.2, linked.link.resume)
            resumed.start()
        reference.check(sequence, device=linked.device)
        resumed.join()
        until = time.monotonic() + PATIENCE_S
        while not _expired(reference_to_memory) and time.monotonic() < until:
            linked.store.engine.queue.collect()
            time.sleep(0.005)
        assert _expired(reference_to_memory)
        sequence.prefetch([0, 1])
        sequence.delete()


@pytest.mark.parametrize("how", ["truncate", "delete", "from elsewhere", "too long"])
def test_what_nobody_wants_any_more_is_not_read(folder, how):
    with linked_store(folder, *EMULATED.values, policy="direct") as linked:
        shape = spdk_kv.KVShape(1, 4, 128, torch.float32, 2000)
        sequence, kv = linked.store.sequence("s", shape), torch.ones(1, 4, 1024, 128)
        sequence.append(0, kv, kv)
        sequence.settle(0)
        sequence.read(0, tokens=slice(0, 1), device=linked.device)  # what is read ahead goes there
        before = linked.carried()[0]
        linked.link.pause()
        try:
            sequence.prefetch([0], spare_tokens=0)
            match how:
                case "truncate":
                    sequence.truncate(1000)
                case "delete":
                    sequence.delete()
                case "from elsewhere":
                    sequence.prefetch([0], first_token=1024)
                case "too long":
                    more = torch.ones(1, 4, 1, 128)
                    sequence.append(0, more, more)
                    sequence._layers[0].reader.take_prefetched(0)
        finally:
            linked.link.resume()
        until = time.monotonic() + PATIENCE_S
        while linked.store.engine.queue.active and time.monotonic() < until:
            time.sleep(0.001)
        assert not linked.store.engine.queue.active
        assert linked.carried()[0] - before < kv.nbytes  # half of what was prefetched


@pytest.mark.machine
def test_what_is_on_its_way_directly_is_read_through_the_cache_once_promoted(folder):
    with linked_store(folder, *EMULATED.values) as linked:
        store = linked.store
        set_available(store, 0)
        sequence, reference = written(linked, "layer", [600])
        sequence.read_ahead = False
        reference.check(sequence, device=linked.device)
        assert "C" not in paths(store)
        reader = sequence._layers[0].reader
        plan = reader.plan

        def planned(*how: Any) -> Any:
            linked.link.resume()
            return plan(*how)

        linked.link.pause()
        otherwise = threading.Timer(20, linked.link.resume)
        otherwise.start()
        sequence.prefetch([0])
        reader.plan = planned
        set_available(store, PLENTY)
        reference.check_layer(sequence, 0, device=linked.device)
        otherwise.cancel()
        assert paths(store) == ["C"] * 4
        whole = sum(unit.nbytes for unit in units(store)[:2])
        assert resident_nbytes(store) == whole
        assert store.stats()["residency"]["filled_nbytes"] == whole
        # And what is there already is taken, however it came.
        set_available(store, 0)
        reference.check(sequence, device=linked.device)
        sequence.prefetch([0])
        for part in reader.prefetched.reading.parts:
            part.engine.wait(part.transfer)
        set_available(store, PLENTY)
        directly = store.stats()["residency"]["direct_read_nbytes"]
        reference.check_layer(sequence, 0, device=linked.device)
        assert store.stats()["residency"]["direct_read_nbytes"] == directly + whole


def _expired(reference: int) -> bool:
    return bool(torch.UntypedStorage._expired(reference))
