"""SGLang's own pools and controller on the CPU, as a rank of an engine would have them.

Imported where SGLang is installed only.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry, base
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.runtime_context import get_parallel

PAGE, LAYERS, HEADS, DIM = 16, 4, 2, 32
MODEL = "some/model"
LIMIT_S = 120
# SGLang compiles the hash of its keys when it is first used: for this environment's torch.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
# SGLang leaves 10 GiB of memory to others, which not every machine has that runs tests.
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
# Kept: what `override` returns restores everything when it is collected.
_KEPT: list[Any] = []


def start() -> None:
    """One rank of one: process group, and SGLang's view of it."""
    if _KEPT:
        return
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    forced = get_parallel().override(
        **{f"{name}_{kind}": value
           for name in ("tp", "pp", "attn_tp", "attn_cp", "attn_dp", "attn_dcp")
           for kind, value in (("rank", 0), ("size", 1))}
    )  # fmt: skip
    forced.__enter__()
    _KEPT.append(forced)


def mha_pools(
    layout: str, *, tokens: int = 512, dtype: torch.dtype = torch.bfloat16, page: int = PAGE
) -> tuple[MHATokenToKVPool, MHATokenToKVPoolHost]:
    """A device pool (on the CPU), and the host pool beside it."""
    device = MHATokenToKVPool(
        tokens, page, dtype, HEADS, DIM, LAYERS, "cpu", False, enable_alt_stream=False
    )
    host = MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        host_to_device_ratio=2.0,
        host_size=0,
        page_size=page,
        layout=layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=tokens,
        start_layer=0,
        end_layer=LAYERS - 1,
    )
    return device, host


def mla_pools(layout: str, *, tokens: int = 512) -> tuple[MLATokenToKVPool, MLATokenToKVPoolHost]:
    """As :func:`mha_pools`, of a model with multi-head latent attention."""
    device = MLATokenToKVPool(tokens, PAGE, torch.bfloat16, 64, 32, LAYERS, "cpu", False)
    host = MLATokenToKVPoolHost(
        device._mla_buffer_info(),
        host_to_device_ratio=2.0,
        host_size=0,
        page_size=PAGE,
        layout=layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=tokens,
        target_layer_num=LAYERS,
        start_layer=0,
        end_layer=LAYERS - 1,
    )
    return device, host


def mamba_pool(layout: str = "page_first", *, slots: int = 16) -> MambaPoolHost:
    """The host pool of a hybrid model's states: one slot holds the state after some page."""
    info = MambaStateBufferInfo(
        temporal=torch.zeros((3, slots, 2, 16, 8), dtype=torch.float32),
        conv=(torch.zeros((3, slots, 24, 3), dtype=torch.bfloat16),),
    )
    return MambaPoolHost(
        info, 2.0, 0, device_capacity=slots, pin_memory=False, device="cpu", layout=layout
    )


def config(location: str | Path, **other: Any) -> HiCacheStorageConfig:
    """SGLang's configuration of a backend with its store at ``location``."""
    fields: dict[str, Any] = {
        **{f"{name}_rank": 0 for name in ("tp", "pp", "attn_cp")},
        **{f"{name}_size": 1 for name in ("tp", "pp", "attn_cp")},
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": True,
        "model_name": MODEL,
        "extra_config": extra(location),
    }
    return HiCacheStorageConfig(**{**fields, **other})


def extra(location: str | Path, **options: Any) -> dict[str, Any]:
    """What a user passes as --hicache-storage-backend-extra-config."""
    return {
        "backend_name": "spdk_kv",
        "module_path": "spdk_kv.integrations.sglang",
        "class_name": "HiCacheSpdkKv",
        "interface_v1": 1,
        "location": str(location),
        "capacity": "256 MiB",
        **options,
    }


@contextmanager
def controller(
    device: Any, host: Any, options: dict[str, Any], *, sides: dict[PoolName, Any] | None = None
) -> Iterator[Any]:
    """SGLang's controller with our backend attached, as its scheduler makes it; the one of hybrid
    models where there are pools beside ``host``, by name."""
    start()
    allocator = TokenToKVPoolAllocator(device.size, device.dtype, "cpu", device, False)
    kind, pools = HiCacheController, host
    if sides is not None:
        kind = HybridCacheController
        anchor = PoolEntry(PoolName.KV, host, device, lambda layer: layer, True)
        others = [PoolEntry(name, pool, None, lambda layer: layer) for name, pool in sides.items()]
        pools = HostPoolGroup([anchor, *others])
    made = kind(
        allocator,
        pools,
        host.page_size,
        dist.group.WORLD,
        load_cache_event=threading.Event(),
        write_policy="write_through",
        io_backend="direct",
        storage_backend="dynamic",
        prefetch_threshold=host.page_size,
        model_name=MODEL,
        storage_backend_extra_config=dict(options),
        enable_storage_metrics=True,
    )
    try:
        yield made
    finally:
        if made.enable_storage:
            made.detach_storage_backend()


def write(made: Any, indices: torch.Tensor, tokens: list[int], **other: Any) -> int:
    """Has the host store its pages at ``indices``; returns how many tokens of it are stored."""
    page = made.page_size
    hashes = made.get_hash_str(tokens, None, page)
    made.write_storage(indices, tokens, hash_value=hashes, **other)
    return int(made.ack_backup_queue.get(timeout=LIMIT_S).completed_tokens)


def prefetch(made: Any, tokens: list[int], **other: Any) -> tuple[torch.Tensor, int]:
    """Has the host fetch what is stored of ``tokens``; returns where it is, and how many tokens."""
    request: Any = "a request"
    if isinstance(made, HybridCacheController):
        request = SimpleNamespace(rid=request)
    operation = made.prefetch(request, tokens, **other)
    found = made.prefetch_hit_queue.get(timeout=LIMIT_S)
    assert found is operation
    indices = made.alloc_prefetch_host_buffers(operation, operation.storage_hit_count)
    assert indices is not None
    operation.host_indices = indices
    completed = 0
    made.prefetch_buffer.put(operation)
    while True:
        ack = made.ack_prefetch_queue.get(timeout=LIMIT_S)
        if ack.completed_req:
            return indices, completed
        if ack.completed_tokens is not None:
            completed = ack.completed_tokens


def fill(host: Any, indices: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Writes random bytes to the host's pages; returns them, page by page."""
    generator = torch.Generator().manual_seed(seed)
    pages = []
    for start_ in indices[:: host.page_size].tolist():
        page = host.get_dummy_flat_data_page()
        nbytes = page.numel() * page.element_size()
        noise = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        host.set_from_flat_data_page(start_, noise.view(page.dtype))
        pages.append(noise)
    return pages


def pages_at(host: Any, indices: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of the host's pages."""
    return [
        host.get_data_page(start_, flat=True).contiguous().view(torch.uint8).reshape(-1).clone()
        for start_ in indices[:: host.page_size].tolist()
    ]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Whether all bytes are equal, and there are as many."""
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))
