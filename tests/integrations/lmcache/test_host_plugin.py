"""The adapter `plugin`: LMCache is told what the store holds, after a restart as well."""

from __future__ import annotations

import numpy as np
import pytest

from integrations.lmcache import host
from integrations.signatures import accepts, load

KEYS = [host.key(number, salt="team" if number % 2 else "") for number in range(8)]


def spec(folder, **params):
    plugin = {
        "type": "plugin",
        "module_path": "spdk_kv.integrations.lmcache.adapter",
        "class_name": "Adapter",
    }
    return host.spec(folder, **params) | plugin


def filled(folder, **params):
    storage = host.manager(spec(folder, **params))
    written = host.write(storage, KEYS, host.layout(4096))
    host.wait_stored(storage, 8)
    return storage, written


def usage(storage) -> int:
    ((nbytes, labels),) = storage.get_l2_usages()
    assert labels == {"l2_name": "plugin"}
    return nbytes


def test_usage_status_and_bytes_are_there_after_a_restart(tmp_path):
    storage, written = filled(tmp_path)
    used = usage(storage)
    assert used >= sum(map(len, written))
    storage.close()
    storage = host.manager(spec(tmp_path, capacity=None))
    assert usage(storage) == used
    assert host.prefetch(storage, KEYS, host.layout(4096)) == written
    (status,) = storage.report_status()["l2_adapters"]
    assert status["is_healthy"]
    assert status["type"] == "spdk_kv"
    assert (status["blobs"], status["hits"], status["corruptions"]) == (8, 8, 0)
    assert (status["bytes_used"], status["capacity_bytes"]) == (used, 64 << 20)
    (adapter,) = (adapter for _, adapter in storage.l2_adapters())
    storage.close()
    # As by a thread that is still asking.
    assert adapter.get_usage().total_bytes_used == 0
    assert "blobs" not in adapter.report_status()


def test_deletes_and_eviction_lower_the_usage(tmp_path):
    storage, _ = filled(tmp_path, capacity="5 MiB")
    (adapter,) = (adapter for _, adapter in storage.l2_adapters())
    used = usage(storage)
    adapter.delete(KEYS[:4])
    adapter.client.store.flush()  # space is free when that is durable
    assert usage(storage) == used // 2
    host.write(storage, [host.key(100 + number) for number in range(8)], host.layout(4096))
    host.wait_stored(storage, 8)
    assert used // 2 < usage(storage) <= 5 << 20
    storage.close()


@pytest.mark.parametrize("identity", ["", "bfloat16"])
def test_keys_are_listed_page_by_page(tmp_path, identity):
    storage, written = filled(tmp_path, identity=identity)
    (adapter,) = (adapter for _, adapter in storage.l2_adapters())
    adapter.client.store.put("of somebody else", np.zeros(5))
    listed, cursor = [], None
    while True:
        page = adapter.list_l2_keys("org/model", page_size=3, cursor=cursor)
        listed += page.entries
        if (cursor := page.next_page_token) is None:
            break
    assert {entry.key.to_object_key() for entry in listed} == set(KEYS)
    assert len(listed) == 8
    assert {entry.size_bytes for entry in listed} == {len(written[0])}
    assert adapter.list_l2_keys("org/mod").entries == ()
    with pytest.raises(ValueError, match="page_size"):
        adapter.list_l2_keys(page_size=0)
    storage.close()


def test_it_takes_every_call_of_lmcache():
    from integrations.lmcache.test_contract import BASE, SIGNATURES
    from spdk_kv.integrations.lmcache.adapter import Adapter

    assert accepts(Adapter, load(SIGNATURES)[BASE]) == []
