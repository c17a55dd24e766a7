"""Our class takes every call that SGLang makes, as recorded at the pinned version; where SGLang is
installed, the record is what it says today."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from integrations.signatures import Recorded, accepts, load, record, save
from spdk_kv.integrations.sglang.backend import Backend

HERE = Path(__file__).parent
SIGNATURES = HERE / "signatures.json"
BASE = "HiCacheStorage"
CALLED = (
    *("register_mem_pool_host", "register_mem_host_pool_v2", "on_host_pools_registered"),
    *("batch_exists_v2", "batch_get_v2", "batch_set_v2", "batch_get_v1", "batch_set_v1"),
    *("get", "batch_get", "set", "batch_set", "exists", "batch_exists", "clear", "get_stats"),
)
# Not called on us, but what ours rests on.
POOLS = {
    "MHATokenToKVPoolHost": ("get_page_buffer_meta", "get_data_page", "get_dummy_flat_data_page"),
    "MLATokenToKVPoolHost": ("get_page_buffer_meta", "set_from_flat_data_page"),
    "MambaPoolHost": ("get_page_buffer_meta", "get_data_page", "set_from_flat_data_page"),
}


def real() -> dict[str, Recorded]:
    """What the installed SGLang says."""
    from sglang.srt.mem_cache import hicache_storage
    from sglang.srt.mem_cache.pool_host import mamba, mha, mla
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    found = {BASE: record(hicache_storage.HiCacheStorage, CALLED)}
    for kind in (hicache_storage.HiCacheStorageConfig, hicache_storage.PoolTransfer):
        found[kind.__name__] = record(kind, ("__init__",))
    found["PoolTransferResult"] = record(hicache_storage.PoolTransferResult, ("__init__",))
    found["StorageBackendFactory"] = record(StorageBackendFactory, ("_create_dynamic_backend",))
    for module, (name, methods) in zip((mha, mla, mamba), POOLS.items(), strict=True):
        found[name] = record(getattr(module, name), methods)
    return found


def test_ours_takes_every_call_of_sglang() -> None:
    assert accepts(Backend, load(SIGNATURES)[BASE]) == []


def test_ours_has_whatever_the_host_leaves_open() -> None:
    sglang = pytest.importorskip(
        "sglang.srt.mem_cache.hicache_storage",
        reason="SGLang is not installed: scripts/test.sh --hosts sglang",
    )
    from spdk_kv.integrations.sglang import HiCacheSpdkKv

    assert issubclass(HiCacheSpdkKv, sglang.HiCacheStorage)
    assert not HiCacheSpdkKv.__abstractmethods__
    inherited = [name for name in CALLED if name not in vars(Backend)]
    assert inherited == []


def test_the_record_is_what_sglang_says() -> None:
    pytest.importorskip("sglang", reason="SGLang is not installed: scripts/test.sh --hosts sglang")
    pinned = re.search(r"sglang==(\S+)", (HERE / "requirements.txt").read_text())
    assert pinned
    assert version("sglang") == pinned[1]
    assert real() == load(SIGNATURES)


if __name__ == "__main__":
    save(SIGNATURES, real())
