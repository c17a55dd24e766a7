"""Whose pages they are: keys that no other model, dtype, layout or rank comes to."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from spdk_kv.integrations.sglang.options import StorageConfig

log = logging.getLogger(__name__)

# Bump it when the bytes of a page change their order.
_FORMAT = 1
# How the engine was started, as far as it changes what tokens are computed to.
_MODEL = (
    *("model_path", "revision", "load_format", "model_impl", "json_model_override_args"),
    *("dtype", "quantization", "quantization_param_path", "kv_cache_dtype", "qsa_indexer_dtype"),
    *("modelopt_quant", "rl_quant_profile"),
)
_DRAFT = (
    *("speculative_algorithm", "speculative_draft_model_path", "speculative_draft_model_revision"),
    *("speculative_draft_model_quantization", "speculative_draft_kv_cache_dtype"),
)
# What a host pool says of the bytes in a page. A pool that has them alike lays them out alike.
_POOL = (
    *("layout", "page_size", "layer_num", "target_layer_num", "start_layer", "end_layer"),
    *("head_num", "head_dim", "v_head_dim", "kv_cache_dim", "kv_lora_rank", "qk_rope_head_dim"),
    *("size_per_token", "item_bytes", "row_bytes", "storage_format_tag", "dcp_size"),
    *("indexer_dtype", "indexer_page_stride_size", "override_kv_cache_dim"),
    *("num_mamba_layers", "temporal_dtype", "conv_dtype"),
    *("temporal_state_elem_size", "conv_state_elem_sizes", "head_group_num"),
)


def digest(facts: Any) -> bytes:
    """32 bytes that stand for ``facts``."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def model_facts(config: StorageConfig, identity: str) -> dict[str, Any]:
    """What tells one model from another: its name, how the engine that runs in this process was
    started, and, where it lies in a folder, its files."""
    facts: dict[str, Any] = {"format": _FORMAT, "name": config.model_name, "identity": identity}
    facts.update(_settings("get_model", _MODEL))
    facts.update(_settings("get_spec", _DRAFT))
    for name in ("name", "model_path", "speculative_draft_model_path"):
        if files := _files(facts.get(name)):
            facts[f"{name} files"] = files
    told_apart = identity or facts.get("revision", "None") != "None"
    if not (told_apart or "name files" in facts or "model_path files" in facts):
        log.warning(
            "spdk_kv knows the model %r by its name only: set the option identity (to the "
            "revision, say) where other weights may come under that name",
            config.model_name,
        )
    return facts


def _settings(group: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Settings of the engine in this process; none where no engine runs."""
    context = sys.modules.get("sglang.srt.runtime_context")
    try:
        settings = getattr(context, group)()
    except (AttributeError, ValueError):  # not loaded; not published
        return {}
    return {name: str(getattr(settings, name, None)) for name in names}


def _files(folder: object) -> list[tuple[str, int, int]]:
    """Name, bytes and time of each file of a model in a folder; weights are too large to read."""
    if not isinstance(folder, str) or not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def shard_facts(config: StorageConfig, *, shared: bool) -> dict[str, Any]:
    """Which part of the model: ``shared`` is what all tensor-parallel ranks have alike."""
    facts: dict[str, Any] = {
        "pp": (config.pp_rank, config.pp_size),
        "cp": (config.attn_cp_rank, config.attn_cp_size),
        "dcp": (getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)),
    }
    if not shared:
        facts["tp"] = (config.tp_rank, config.tp_size)
    return facts


def pool_facts(pool: object) -> dict[str, Any]:
    """What the bytes of one of its pages are, and in which order."""
    facts = {name: str(getattr(pool, name, None)) for name in _POOL}
    # The class stands for the order of what is in a page.
    return {"kind": type(pool).__qualname__, "dtype": str(getattr(pool, "dtype", None)), **facts}


class Keys:
    """Makes the store's keys of SGLang's: short, whatever the length of those.

    ``prefix``: of all keys of the model. The rest is 144 bits of a hash over the facts and
    SGLang's key.
    """

    def __init__(self, model: Mapping[str, Any], *facts: Mapping[str, Any]) -> None:
        self.prefix = prefix(model)
        self._seed = digest([dict(model), *map(dict, facts)])

    def __call__(self, key: str) -> str:
        made = hashlib.blake2b(
            key.encode("utf-8", "surrogatepass"), digest_size=18, key=self._seed
        ).digest()
        return self.prefix + base64.urlsafe_b64encode(made).decode()


def prefix(model: Mapping[str, Any]) -> str:
    """What the store's keys of a model begin with."""
    return f"sgl:{base64.urlsafe_b64encode(digest(dict(model))[:9]).decode()}:"
