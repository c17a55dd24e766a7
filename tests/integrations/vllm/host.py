"""vLLM's own tiering spec and manager with a tier of ours, used as its scheduler uses them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from support.waiting import wait_until

ROW_NBYTES = 64 << 10
CHUNKS = 64


def config_of(tier: dict[str, Any], **changes: Any) -> Any:
    """vLLM's configuration of an offloading connector with one secondary tier. ``changes``: of the
    model, the cache or the parallel layout, by the names of their fields, or ``row_nbytes``."""
    from vllm.v1.kv_offload import config as vllm

    row_nbytes = changes.pop("row_nbytes", ROW_NBYTES)
    chunks = changes.pop("chunks", CHUNKS)
    model = {"name": "tiny", "dtype": "bfloat16"}
    cache = {"tokens_per_hash": 16, "blocks_per_chunk": 1}
    parallel = {
        "rank": 0,
        "world_size": 1,
        "tp_size": 1,
        "pp_size": 1,
        "pcp_size": 1,
        "dcp_size": 1,
        "data_parallel_index": 0,
        "data_parallel_size": 1,
        "data_parallel_rank_local": None,
        "is_parallelism_agnostic": False,
    }
    whole = {"layers": ("layers.0",), "kv_cache_layout": "NHD"}
    for part in (model, cache, parallel, whole):
        part.update({name: changes.pop(name) for name in list(changes) if name in part})
    assert not changes, f"no such fields: {changes}"
    group = vllm.OffloadingGroupConfig(tokens_per_block=16, layer_names=whole["layers"], group_id=0)
    return vllm.OffloadingConfig(
        groups=(group,),
        worker_kv_bytes_per_block=row_nbytes,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": chunks * row_nbytes, "secondary_tiers": [tier]},
        engine_id=f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}",
        model=vllm.OffloadingModelConfig(**model),
        cache=vllm.OffloadingCacheConfig(**cache),
        parallel=vllm.OffloadingParallelConfig(**parallel),
        kv_cache_layout=whole["kv_cache_layout"],
    )


def tier_at(location: Any, **options: Any) -> dict[str, Any]:
    """An entry of ``secondary_tiers``."""
    if os.fspath(location).startswith("/"):
        location = f"file://{location}"
    options = {"capacity": "64 MiB"} | options
    if options.get("read_only"):
        del options["capacity"]
    return {
        "type": "SpdkKvTier",
        "module_path": "spdk_kv.integrations.vllm",
        "location": str(location),
        **options,
    }


class Host:
    """One engine's offloading, without the engine."""

    def __init__(self, tier: dict[str, Any], **changes: Any) -> None:
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        self.spec = TieringOffloadingSpec(config_of(tier, **changes))
        self.manager = self.spec.get_manager()
        (self.tier,) = self.manager.secondary_tiers
        self._requests = 0

    @property
    def jobs(self) -> int:
        """How many transfers vLLM waits for."""
        return len(self.manager._jobs)

    def step(self) -> None:
        """The end of a step of the scheduler."""
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def run(self) -> None:
        """Steps until nothing is under way."""

        def idle() -> bool:
            self.step()
            return not self.jobs

        wait_until(idle)

    @contextmanager
    def request(self) -> Iterator[Any]:
        """A request's context."""
        from vllm.v1.kv_offload.base import ReqContext

        self._requests += 1
        context = ReqContext(req_id=f"r{self._requests}")
        self.manager.on_new_request(context)
        yield context
        self.manager.on_request_finished(context)

    def begin_store(self, contents: dict[bytes, bytes]) -> None:
        """Stores blocks as if the model had computed them; the jobs are under way then."""
        with self.request() as context:
            prepared = self.manager.prepare_store(list(contents), context)
            assert prepared is not None, "the CPU cache has no room"
            rows = np.asarray(self.manager.primary_tier.get_kv_memoryview())
            for key, chunk in zip(
                prepared.keys_to_store, prepared.store_spec.chunk_ids, strict=True
            ):
                rows[chunk] = np.frombuffer(contents[key], np.int8)
            del rows
            self.manager.complete_store(prepared.keys_to_store, context)

    def store(self, contents: dict[bytes, bytes]) -> None:
        """As :meth:`begin_store`, to its end."""
        self.begin_store(contents)
        self.run()

    def forget_memory(self) -> None:
        """Empties the CPU cache, so that the tier is asked."""
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):
            self.manager.on_reset_flushed()

    def load(self, keys: list[bytes]) -> list[bytes | None]:
        """What a request gets for ``keys``: None is computed again."""
        from vllm.v1.kv_offload.base import LookupResult

        found: list[bytes | None] = []
        with self.request() as context:
            results: list[Any] = []

            def decided() -> bool:
                results[:] = [self.manager.lookup(key, context) for key in keys]
                self.step()
                return all(r in (LookupResult.HIT, LookupResult.MISS) for r in results)

            wait_until(decided)
            for key, result in zip(keys, results, strict=True):
                if result is LookupResult.MISS:
                    found.append(None)
                    continue
                (chunk,) = self.manager.prepare_load([key], context).chunk_ids
                view = self.manager.primary_tier.get_kv_memoryview()
                found.append(np.asarray(view)[chunk].tobytes())
                self.manager.complete_load([key], context)
        return found

    def stop(self) -> None:
        """As vLLM's engine stops it."""
        self.manager.shutdown()


@contextmanager
def host(tier: dict[str, Any], **changes: Any) -> Iterator[Host]:
    """A host for the length of a block."""
    running = Host(tier, **changes)
    try:
        yield running
    finally:
        running.stop()


def key_of(number: int, nbytes: int = 32) -> bytes:
    """vLLM's key of a block: a hash, and its group."""
    return np.random.default_rng(number).bytes(nbytes) + bytes(4)


def content_of(number: int, nbytes: int = ROW_NBYTES) -> bytes:
    """What that block holds."""
    return np.random.default_rng([number, 1]).bytes(nbytes)


def blocks(numbers: Any, nbytes: int = ROW_NBYTES) -> dict[bytes, bytes]:
    """Blocks by their keys."""
    return {key_of(number): content_of(number, nbytes) for number in numbers}
