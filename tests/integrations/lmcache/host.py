"""LMCache as it is installed: its adapter over a client, its storage manager, its program."""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="LMCache is not installed: scripts/test.sh --hosts")

os.environ["LMCACHE_TRACK_USAGE"] = "false"

import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import NativeConnectorL2Adapter
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from support.waiting import PATIENCE_S, wait_until

__all__ = ["NativeConnectorL2Adapter"]

# What a user's shell has, without what counts their use.
ENVIRONMENT = os.environ | {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
PROGRAM = str(Path(sys.executable).with_name("lmcache"))


def spec(folder: Path, **params: Any) -> dict[str, Any]:
    """The configuration of the how-to page."""
    return {
        "type": "native_plugin",
        "module_path": "spdk_kv.integrations.lmcache",
        "class_name": "Client",
        "adapter_params": {"location": f"file://{folder}/kv", "capacity": "64 MiB"} | params,
    }


def key(number: int, model: str = "org/model", rank: int = 1, salt: str = "") -> ObjectKey:
    return ObjectKey(number.to_bytes(16, "big"), model, rank, 0, salt)


def objects(tensors: Sequence[torch.Tensor]) -> list[TensorMemoryObj]:
    """Objects of LMCache's over flat tensors of bytes."""
    return [
        TensorMemoryObj(
            tensor,
            MemoryObjMetadata(
                shape=tensor.shape,
                dtype=torch.uint8,
                address=0,
                phy_size=tensor.numel(),
                fmt=MemoryFormat.KV_2LTD,
                ref_count=1,
            ),
            None,
        )
        for tensor in tensors
    ]


def noise(number: int, nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


# -- an adapter, as LMCache's controllers drive it ------------------------------------------------


def ended(fd: int, ask: Any) -> Any:
    """What ``ask`` answers once it has an answer; waits on the adapter's descriptor."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while not (answer := ask()):
        assert poller.poll(PATIENCE_S * 1000), "it never ends"
        consume_fd(fd)
    return answer


def store(adapter: Any, keys: Sequence[ObjectKey], tensors: Sequence[torch.Tensor]) -> bool:
    task = adapter.submit_store_task(list(keys), objects(tensors))
    done = ended(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)
    assert list(done) == [task]
    return done[task].is_successful()


def load(adapter: Any, keys: Sequence[ObjectKey], tensors: Sequence[torch.Tensor]) -> list[bool]:
    task = adapter.submit_load_task(list(keys), objects(tensors))
    bitmap = ended(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    return [bitmap.test(at) for at in range(len(keys))]


def lookup(adapter: Any, keys: Sequence[ObjectKey]) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(list(keys), {})
    bitmap = ended(
        adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(task)
    )
    return [bitmap.test(at) for at in range(len(keys))]


# -- the storage manager, which an engine's connector talks to ------------------------------------


def manager(*specs: dict[str, Any], l1_nbytes: int = 32 << 20) -> StorageManager:
    words = argparse.Namespace(l2_adapter=[json.dumps(one) for one in specs])
    memory = L1MemoryManagerConfig(size_in_bytes=l1_nbytes, use_lazy=False, shm_name="")
    return StorageManager(
        StorageManagerConfig(
            L1ManagerConfig(memory),
            EvictionConfig("LRU"),
            parse_args_to_l2_adapters_config(words),
        )
    )


def layout(count: int, dtype: torch.dtype = torch.bfloat16) -> MemoryLayoutDesc:
    return MemoryLayoutDesc([torch.Size([2, 4, count, 8])], [dtype])


def write(storage: StorageManager, keys: Sequence[ObjectKey], of: MemoryLayoutDesc) -> list[bytes]:
    """Writes noise as an engine does, and returns it."""
    reserved = storage.reserve_write(list(keys), of)
    assert set(reserved) == set(keys)
    for number, one in enumerate(keys):
        memory = torch.frombuffer(reserved[one].byte_array, dtype=torch.uint8)
        memory.copy_(noise(number, memory.numel()))
    written = [bytes(reserved[one].byte_array) for one in keys]
    storage.finish_write(list(keys))
    return written


def wait_stored(storage: StorageManager, count: int) -> None:
    """Until the store controller has nothing under way and the adapter holds ``count`` keys."""
    client = storage.l2_adapters()[0][1]._client
    wait_until(lambda: len(client.store) >= count, f"{len(client.store)} of {count} were stored")
    wait_until(lambda: storage.report_status()["store_controller"]["in_flight_task_count"] == 0)


def prefetch(
    storage: StorageManager, keys: Sequence[ObjectKey], of: MemoryLayoutDesc
) -> list[bytes]:
    """What a lookup finds of a prompt's leading chunks, as bytes; from L2 where L1 has none."""
    row = GroupedObjectKeys(list(keys), 0, of)
    handle = storage.submit_prefetch_task(PrefetchTaskSpec([row], num_kv_readers=1))
    assert storage.wait_prefetch_status(handle, PATIENCE_S)
    result = storage.query_prefetch_status(handle)
    hits = [one for at, one in enumerate(keys) if result.hit_cells[0].test(at)]
    if not hits:
        return []
    with storage.read_prefetched_results(hits) as found:
        assert found is not None
        copied = [bytes(one.byte_array) for one in found]
    storage.finish_read_prefetched(hits)
    return copied


# -- the program ----------------------------------------------------------------------------------


def bench(folder: Path, *words: str, **params: Any) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, "bench", "l2", "--l2-adapter", json.dumps(spec(folder, **params)), *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S, check=False
    )
