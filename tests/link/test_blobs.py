"""Blobs of tensors on a device that is reached over a link."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from link.helpers import DEVICES, EMULATED, Linked, linked_store
from spdk_kv.errors import CorruptionError, DeviceError, DeviceTimeout, KeyNotFound, ShapeMismatch
from spdk_kv.types import torch_dtypes
from store.helpers import assert_same, extent_of, flip, folder_fixture, noise, tensor_of
from support.waiting import PATIENCE_S

folder = folder_fixture


@pytest.fixture(params=DEVICES)
def device(request) -> Any:
    return request.param


@pytest.fixture(params=["uring", "threads", "pagecache", "ram"])
def linked(request, folder, device) -> Iterator[Linked]:
    ram = request.param == "ram"
    options = {} if ram else {"engine": request.param}
    with linked_store("ram://" if ram else folder, device, **options) as found:
        yield found


@pytest.fixture
def emulated(folder) -> Iterator[Linked]:
    with linked_store(folder, *EMULATED.values) as found:
        yield found


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 65536, 70001, (3 << 20) + 5])
def test_exact_bytes_both_ways(linked, nbytes):
    data = noise(nbytes, nbytes)
    linked.store.put("a", data.to(linked.device))
    found = linked.store.get("a", device=linked.device)
    assert found.device.type == linked.device
    assert_same(found, data)
    assert_same(linked.store.get("a"), data)  # the checksums are those of the bytes
    out = torch.full((nbytes + 100,), 0xEE, dtype=torch.uint8, device=linked.device)
    into = out[50 : 50 + nbytes]
    assert linked.store.get("a", out=into) is into
    assert_same(into, data)
    assert set(out[:50].tolist()) | set(out[50 + nbytes :].tolist()) == {0xEE}
    assert linked.carried() == (2 * nbytes, nbytes)
    seen = linked.store.stats()["pipelines"]
    assert seen[0]["read"]["depth"] >= 1
    assert seen[0]["write"]["segment_nbytes"] >= 4096


@pytest.mark.parametrize("dtype", sorted(torch_dtypes()))
def test_every_dtype_and_shape(device, dtype):
    with linked_store("ram://", device) as linked:
        for number, shape in enumerate([(), (0, 3), (7,), (3, 5, 8)]):
            data = tensor_of(getattr(torch, dtype), shape, number)
            linked.store.put("a", data.to(linked.device))
            assert_same(linked.store.get("a", device=linked.device), data)


def test_strides_and_lazy_values(linked):
    data = noise(4096).view(torch.complex64).view(16, 32)
    for tensor in (data.T, data[::2, 3:9], data.conj(), data.T.conj()):
        linked.store.put("a", tensor.to(linked.device))
        assert_same(linked.store.get("a", device=linked.device), tensor)
        out = torch.zeros_like(tensor, device=linked.device)
        assert_same(linked.store.get("a", out=out), tensor)
        turned = torch.zeros(*reversed(tensor.shape), dtype=tensor.dtype, device=linked.device)
        assert_same(linked.store.get("a", out=turned.T), tensor)


def test_many_at_once_and_mixtures(linked):
    data = {f"k{number}": noise(number * 1000, number) for number in range(8)}
    linked.store.put_many({key: one.to(linked.device) for key, one in data.items()})
    for found, one in zip(
        linked.store.get_many(data, device=linked.device), data.values(), strict=True
    ):
        assert_same(found, one)
    # Arrays and tensors side by side go through host memory.
    linked.store.put_many({"a": data["k3"].to(linked.device), "b": data["k4"].numpy()})
    outs = [torch.zeros(3000, dtype=torch.uint8, device=linked.device), np.zeros(4000, np.uint8)]
    found = linked.store.get_many(["a", "b"], out=outs)
    assert_same(found[0], data["k3"])
    assert_same(torch.from_numpy(found[1]), data["k4"])
    assert linked.store.get("a", device=linked.device, as_numpy=True).nbytes == 3000
    assert linked.store.get_many([], device=linked.device) == []
    with pytest.raises(KeyNotFound):
        linked.store.get("none", device=linked.device)
    with pytest.raises(ShapeMismatch):
        linked.store.get("a", out=outs[0][:5])


def test_futures(linked):
    data = noise(1 << 20)
    linked.store.put_async("a", data.to(linked.device)).result(PATIENCE_S)
    found = linked.store.get_async("a", device=linked.device).result(PATIENCE_S)
    assert_same(found, data)
    pending = [linked.store.get_async("a", device=linked.device) for _ in range(8)]
    del found
    gc.collect()
    for one in pending:
        assert_same(one.result(PATIENCE_S), data)


def test_a_damaged_blob_is_never_returned(linked):
    if not linked.store.engine.persistent:
        pytest.skip("memory has no file to damage")
    linked.store.put("a", noise(200_000).to(linked.device))
    linked.store.flush()
    linked.store.put("b", noise(5000, 1).to(linked.device))
    offset, _ = extent_of(linked.store, "a")
    flip(linked.store.engine.where, offset + 100_000)
    if not linked.store.engine.direct:
        flip(linked.store.engine.where, offset + 100_001)
    with pytest.raises(CorruptionError, match="CRC32C"):
        linked.store.get_many(["a", "b"], device=linked.device)
    assert linked.store.keys() == ["b"]
    assert_same(linked.store.get("b", device=linked.device), noise(5000, 1))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_copy_that_fails_is_an_error_and_loses_nothing(emulated, at_once):
    store, link, data = emulated.store, emulated.link, noise(1 << 20)
    store.put("a", data)
    link.fail(2, at_once=at_once)
    with pytest.raises(DeviceError, match="to the GPU"):
        store.get("a", device="cpu")
    link.fail(2, at_once=at_once)
    with pytest.raises(DeviceError, match="to the GPU"):
        store.get_async("a", device="cpu").result(PATIENCE_S)
    link.fail(2, at_once=at_once)
    with pytest.raises(DeviceError, match="from the GPU"):
        store.put("a", noise(1 << 20, 1))
    link.fail(2, at_once=at_once)
    with pytest.raises(DeviceError, match="from the GPU"):
        store.put_async("b", noise(1 << 20, 1)).result(PATIENCE_S)
    assert store.keys() == ["a"]
    assert_same(store.get("a", device="cpu"), data)


def test_after_a_deadline_memory_stays_out_of_use_until_the_link_lets_go(emulated):
    store, link, data = emulated.store, emulated.link, noise(1 << 20)
    store.put("a", data)
    out = torch.full((1 << 20,), 0xEE, dtype=torch.uint8)
    alive = out.untyped_storage()._weak_ref()
    link.pause()
    try:
        with pytest.raises(DeviceTimeout):
            store.get("a", out=out, timeout_s=0.2)
        with pytest.raises(DeviceTimeout):
            store.put("b", data, timeout_s=0.2)
        del out
        gc.collect()
        assert not torch.UntypedStorage._expired(alive)
    finally:
        resumed = threading.Timer(0.1, link.resume)
        resumed.start()
    assert store.keys() == ["a"]
    assert_same(store.get("a", device="cpu", timeout_s=PATIENCE_S), data)
    resumed.join()
