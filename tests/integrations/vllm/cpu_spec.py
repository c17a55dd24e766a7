"""vLLM's tiering spec for models that run on the CPU: the shipped one copies with CUDA."""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    """Everything but the worker is vLLM's."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            assert self.blocks_per_chunk == 1
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, region)
        return self._worker


class CopyingWorker(OffloadingWorker):
    """Copies blocks between the model's memory and the CPU cache, at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._model = [cache.tensor for cache in kv_caches.tensors]
        self._cache = [
            region.create_next_worker_view(cache.page_size_bytes) for cache in kv_caches.tensors
        ]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, self._model, src_spec, self._cache, dst_spec)

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: LoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        return self._copy(job_id, self._cache, src_spec, self._model, dst_spec)

    def _copy(self, job_id, sources, source_spec, targets, target_spec) -> bool:
        from_ids = torch.as_tensor(source_spec.block_ids, dtype=torch.long)
        to_ids = torch.as_tensor(target_spec.block_ids, dtype=torch.long)
        for source, target in zip(sources, targets, strict=True):
            target[to_ids] = source[from_ids]
        self._done.append(TransferResult(job_id=job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._cache.clear()
        self._region.cleanup()
