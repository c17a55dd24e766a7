"""LMCache's own adapter and storage manager over our client: what an engine wrote comes back, after
a restart too; what is under another layout's length, damaged or gone is a miss."""

from __future__ import annotations

import pytest
import torch

from integrations.lmcache import host
from spdk_kv.integrations.lmcache import Client
from store.helpers import extent_of, flip
from support.waiting import wait_until

KEYS = [host.key(number) for number in range(8)]


@pytest.fixture
def client(tmp_path):
    client = Client(location=f"file://{tmp_path}/kv", capacity="64 MiB")
    yield client
    client.close()


@pytest.fixture
def adapter(client):
    adapter = host.NativeConnectorL2Adapter(client)
    yield adapter
    adapter.close()


def test_objects_of_any_length_come_back_through_the_adapter(adapter):
    sizes = [1, 100, 4095, 4096, 4097, 1 << 20, (1 << 20) + 3, 3_000_001]
    tensors = [host.noise(at, nbytes) for at, nbytes in enumerate(sizes)]
    assert host.store(adapter, KEYS, tensors)
    assert host.lookup(adapter, [*KEYS, host.key(99)]) == [True] * 8 + [False]
    places = [torch.zeros_like(tensor) for tensor in tensors]
    assert host.load(adapter, KEYS, places) == [True] * 8
    assert all(torch.equal(a, b) for a, b in zip(tensors, places, strict=True))
    assert adapter.get_usage().total_bytes_used == sum(sizes)


def test_of_another_model_rank_or_salt_nothing_is_found(adapter):
    assert host.store(adapter, [host.key(1, salt="a")], [host.noise(1, 5000)])
    others = [
        host.key(1),
        host.key(1, salt="b"),
        host.key(1, model="org/other", salt="a"),
        host.key(1, rank=2, salt="a"),
    ]
    assert host.lookup(adapter, others) == [False] * 4
    assert host.load(adapter, others, [torch.zeros(5000, dtype=torch.uint8)] * 4) == [False] * 4


def test_deletes_free_what_was_stored_and_lower_the_usage(adapter, client):
    assert host.store(adapter, KEYS[:2], [host.noise(at, 1 << 20) for at in range(2)])
    adapter.delete([KEYS[0], host.key(99)])
    assert host.lookup(adapter, KEYS[:2]) == [False, True]
    assert adapter.get_usage().total_bytes_used == 1 << 20
    assert len(client.store) == 1


def test_a_damaged_object_is_a_miss_and_counted_and_stored_anew(adapter, client, tmp_path):
    tensors = [host.noise(at, 100_000) for at in range(3)]
    assert host.store(adapter, KEYS[:3], tensors)
    client.store.flush()
    name = next(name for name in client.store.keys("") if name.endswith(f"{1:032x}"))
    offset, nbytes = extent_of(client.store, name)
    flip(tmp_path / "kv" / "data", offset + nbytes // 2)
    places = [torch.zeros_like(tensor) for tensor in tensors]
    assert host.load(adapter, KEYS[:3], places) == [True, False, True]
    assert torch.equal(places[0], tensors[0])
    assert torch.equal(places[2], tensors[2])
    assert client.store.stats()["corruptions"] == 1
    assert host.lookup(adapter, KEYS[:3]) == [True, False, True]
    assert host.store(adapter, [KEYS[1]], [tensors[1]])
    assert host.load(adapter, [KEYS[1]], [places[1]]) == [True]
    assert torch.equal(places[1], tensors[1])


def test_what_an_engine_wrote_is_found_by_a_fresh_process_s_manager(tmp_path):
    of = host.layout(64)
    storage = host.manager(host.spec(tmp_path))
    written = host.write(storage, KEYS, of)
    host.wait_stored(storage, 8)
    storage.clear()
    assert host.prefetch(storage, KEYS, of) == written
    storage.close()
    storage = host.manager(host.spec(tmp_path, capacity=None))
    assert host.prefetch(storage, KEYS, of) == written
    (adapter,) = (adapter for _, adapter in storage.l2_adapters())
    assert adapter._client.store.stats()["used_nbytes"] >= sum(map(len, written))
    storage.close()


def test_another_length_under_the_same_keys_is_a_miss_and_then_replaced(tmp_path):
    storage = host.manager(host.spec(tmp_path))
    host.write(storage, KEYS, host.layout(64))
    host.wait_stored(storage, 8)
    storage.clear()
    # The model was started anew with twice the tokens in a chunk, or with a type of half the bytes.
    for other in (host.layout(128), host.layout(64, torch.uint8)):
        assert host.prefetch(storage, KEYS, other) == []
    written = host.write(storage, KEYS, host.layout(128))
    client = storage.l2_adapters()[0][1]._client
    names = client.store.keys()
    wait_until(lambda: set(client.store.sizes(names)) == {len(written[0])})
    wait_until(lambda: storage.report_status()["store_controller"]["in_flight_task_count"] == 0)
    storage.clear()
    assert host.prefetch(storage, KEYS, host.layout(128)) == written
    storage.close()


def test_another_type_of_the_same_length_is_a_miss_by_identity(tmp_path):
    storage = host.manager(host.spec(tmp_path, identity="bfloat16"))
    host.write(storage, KEYS, host.layout(64))
    host.wait_stored(storage, 8)
    storage.close()
    storage = host.manager(host.spec(tmp_path, identity="float16"))
    assert host.prefetch(storage, KEYS, host.layout(64, torch.float16)) == []
    storage.close()
