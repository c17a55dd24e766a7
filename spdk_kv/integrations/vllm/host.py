"""The tier as a class of vLLM's. Importing this imports vLLM (0.32 and 0.33)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from spdk_kv.integrations.vllm.identity import weights_of
from spdk_kv.integrations.vllm.tier import Tier, Words


class SpdkKvTier(Tier, SecondaryTierManager):  # type: ignore[misc]
    """A secondary tier of vLLM's offloading connector; its configuration names it::

    {"type": "SpdkKvTier", "module_path": "spdk_kv.integrations.vllm",
     "location": "file:///var/cache/kv", "capacity": "64 GiB"}
    """

    medium: ClassVar[Medium] = Medium.STORAGE
    words = Words(
        hit=LookupResult.HIT,
        miss=LookupResult.MISS,
        retry=LookupResult.RETRY,
        result=JobResult,
        request=RequestOffloadingContext,
        stats=OffloadingConnectorStats,
        gauge=OffloadingGaugeMetadata,
        counter=OffloadingCounterMetadata,
        locality=Locality,
    )

    @classmethod
    def facts(cls, offloading_spec: Any, row_nbytes: int, identity: str) -> Mapping[str, Any]:
        """What must be the same for a block to be used again."""
        config = offloading_spec.config
        # As vLLM's own fs tier names its folders. Only bytes that do not depend on how the model
        # is spread over workers may be used by another spread.
        mapper = FileMapper.from_offloading_spec(
            root_dir="",
            offloading_spec=offloading_spec,
            blocks_per_file=offloading_spec.blocks_per_chunk,
            parallel_agnostic=True,
        )
        return {
            **mapper.get_run_config(),
            "rank": mapper.rank,
            "row_nbytes": row_nbytes,
            "kv_cache_layout": config.kv_cache_layout,
            "weights": weights_of(config.model.name, identity),
            # The layout within a block is not promised to stay.
            "version": vllm.__version__,
        }
