"""Hybrid models: pages of several of SGLang's pools, by its own controller for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: scripts/test.sh --hosts sglang")

import torch
from sglang.srt.mem_cache.hicache_storage import (
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool_host import (
    DeepSeekV4PagedHostPool,
    LogicalHostPool,
)

from integrations.sglang import host
from spdk_kv.integrations.sglang import HiCacheSpdkKv

PAGES = 12
TOKENS = list(range(PAGES * host.PAGE))
TRAILING, ALL = PoolHitPolicy.TRAILING_PAGES, PoolHitPolicy.ALL_PAGES


def mamba(keys: list[str], indices: torch.Tensor | None = None) -> PoolTransfer:
    return PoolTransfer(PoolName.MAMBA, host_indices=indices, keys=keys, hit_policy=TRAILING)


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_a_prompt_with_its_state_comes_back_by_the_hosts_threads(
    tmp_path: Path, layout: str
) -> None:
    options = host.extra(f"file://{tmp_path}/kv")
    device, pool = host.mha_pools(layout)
    states = host.mamba_pool(layout)
    with host.controller(device, pool, options, sides={PoolName.MAMBA: states}) as engine:
        indices, slot = pool.alloc(len(TOKENS)), states.alloc(1)
        wanted, state = host.fill(pool, indices, 1), host.fill(states, slot, 2)
        last = engine.get_hash_str(TOKENS, None, host.PAGE)[-1]
        stored = host.write(engine, indices, TOKENS, extra_pools=[mamba([last], slot)])
        assert stored == len(TOKENS)
    device, pool = host.mha_pools(layout)
    states = host.mamba_pool(layout)
    with host.controller(device, pool, options, sides={PoolName.MAMBA: states}) as engine:
        slot = states.alloc(1)
        # The state is there after the last stored page only: what follows is not.
        longer = [*TOKENS, *range(7000, 7000 + 2 * host.PAGE)]
        found, completed = host.prefetch(engine, longer, extra_pools=[mamba(["?"], slot)])
        assert completed == len(TOKENS)
        assert host.same(host.pages_at(pool, found), wanted)
        assert host.same(host.pages_at(states, slot), state)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Any]:
    made = HiCacheSpdkKv(host.config(f"file://{tmp_path}/kv"), {})
    yield made
    made.close()


def test_every_length_at_which_all_pools_can_be_restored_is_told(backend: Any) -> None:
    _, pool = host.mha_pools("page_first")
    states, window = host.mamba_pool(), host.mha_pools("page_first")[1]
    backend.register_mem_pool_host(pool)
    for name, each in ((PoolName.KV, pool), (PoolName.MAMBA, states), (PoolName.SWA, window)):
        backend.register_mem_host_pool_v2(each, name)
    backend.on_host_pools_registered()
    keys = [f"{at:064x}" for at in range(PAGES)]
    indices = torch.arange(PAGES * host.PAGE)
    assert all(backend.batch_set_v1(keys, indices))
    swa = [keys[at] for at in (2, 3, 4, 6, 7, 8)]
    done = backend.batch_set_v2(
        [
            mamba([keys[3], keys[7]], torch.arange(2)),
            PoolTransfer(PoolName.SWA, torch.arange(len(swa) * host.PAGE), keys=swa),
        ]
    )
    assert done == {PoolName.MAMBA: [True] * 2, PoolName.SWA: [True] * len(swa)}

    def asked(*transfers: PoolTransfer) -> tuple[int, dict[Any, int], list[int] | None]:
        found = backend.batch_exists_v2([*keys, "not there"], list(transfers))
        return found.kv_hit_pages, found.extra_pool_hit_pages, found.restorable_prefix_pages

    every = list(range(1, PAGES + 1))
    assert asked() == (PAGES, {PoolName.KV: PAGES}, every)
    assert asked(mamba(["?"])) == (8, {PoolName.KV: PAGES, PoolName.MAMBA: 8}, [4, 8])
    two = PoolTransfer(PoolName.SWA, keys=["?"] * 2, hit_policy=TRAILING)
    assert asked(two)[2] == [4, 5, 8, 9]
    assert asked(mamba(["?"]), two)[2] == [4, 8]
    assert asked(PoolTransfer(PoolName.SWA, hit_policy=ALL)) == (0, {PoolName.KV: PAGES}, [])


def test_a_pool_that_is_not_registered_or_has_no_indices_is_a_miss(backend: Any) -> None:
    _, pool = host.mha_pools("page_first")
    backend.register_mem_pool_host(pool)
    transfer = PoolTransfer(PoolName.SWA, torch.arange(host.PAGE), keys=["a"])
    assert backend.batch_get_v2([transfer]) == {PoolName.SWA: [False]}
    assert backend.batch_set_v2([transfer]) == {PoolName.SWA: [False]}
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    assert backend.batch_set_v2([PoolTransfer(PoolName.KV, keys=["a"])]) == {PoolName.KV: [False]}


def test_pages_of_two_pools_under_one_key_are_two(backend: Any) -> None:
    _, pool = host.mha_pools("page_first")
    _, window = host.mha_pools("page_first")
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(window, PoolName.SWA)
    indices = torch.arange(host.PAGE)
    kv, swa = host.fill(pool, indices, 1), host.fill(window, indices, 2)
    assert backend.batch_set_v1(["a"], indices) == [True]
    transfer = PoolTransfer(PoolName.SWA, indices, keys=["a"])
    assert backend.batch_set_v2([transfer]) == {PoolName.SWA: [True]}
    other = torch.arange(host.PAGE) + host.PAGE
    assert backend.batch_get_v1(["a"], other) == [True]
    assert host.same(host.pages_at(pool, other), kv)
    assert backend.batch_get_v2([PoolTransfer(PoolName.SWA, other, keys=["a"])])[PoolName.SWA]
    assert host.same(host.pages_at(window, other), swa)


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_an_anchor_without_bytes_is_there_as_far_as_its_side_pools_are(
    backend: Any, layout: str
) -> None:
    anchor = LogicalHostPool(1024, host.PAGE)
    device = [torch.zeros(8, 96, dtype=torch.uint8) for _ in range(3)]
    side = DeepSeekV4PagedHostPool("c4", device, 96, 8, host.PAGE, layout, pin_memory=False)
    name = PoolName.DEEPSEEK_V4_C4
    backend.register_mem_pool_host(anchor)
    for label, pool in ((PoolName.KV, anchor), (name, side)):
        backend.register_mem_host_pool_v2(pool, label)
    backend.on_host_pools_registered()
    keys, indices = ["a", "b"], torch.arange(2 * host.PAGE)
    assert backend.batch_set_v1(keys, indices) == [True, True]
    assert backend.batch_get_v1(keys, indices) == [True, True]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_exists_v2(keys, []).kv_hit_pages == 0
    asked = PoolTransfer(name, hit_policy=ALL)
    assert backend.batch_exists_v2(keys, [asked]).kv_hit_pages == 0
    # One tensor a layer, or one for all.
    layers = side.kv_buffer if isinstance(side.kv_buffer, list) else [side.kv_buffer]
    for layer in layers:
        layer.random_(0, 256)
    wanted = [layer.clone() for layer in layers]
    moved = PoolTransfer(name, indices, keys=keys)
    assert backend.batch_set_v2([moved]) == {name: [True, True]}
    assert backend.batch_exists_v2([*keys, "c"], [asked]).kv_hit_pages == 2
    for layer in layers:
        layer[:2] = 0
    assert backend.batch_get_v2([moved]) == {name: [True, True]}
    assert host.same(layers, wanted)
