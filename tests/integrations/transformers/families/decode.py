"""What becomes of a family: its tokens with DynamicCache and with OffloadedKVCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from integrations.transformers.families.extra import CROSS_ATTENTION, EXTRA, INPUTS
from integrations.transformers.families.tiny import VOCABULARY, shrunk
from spdk_kv.errors import ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.store import KVStore

NEW_TOKENS = 9
BIG = 20_000_000  # parameters

KINDS = {
    "DynamicLayer": "K/V",
    "DynamicSlidingWindowLayer": "K/V of a window",
    "DynamicIndexedLayer": "K/V and an index",
    "LinearAttentionLayer": "states",
    "LinearAttentionAndFullAttentionLayer": "K/V and states",
    "LinearAttentionAndSlidingWindowAttentionLayer": "K/V of a window and states",
    "DummyLayer": "nothing",
}

MAPPINGS = [
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
]


@dataclass(frozen=True)
class Row:
    """One family: what its ``layers`` keep, and a ``verdict``.

    That is ``bit-equal``, ``refused: ...`` (when the cache is made), ``not tried: ...`` (it was not
    built, or does not run with DynamicCache), or ``wrong: ...``.
    """

    model_type: str
    model: str
    layers: str
    verdict: str


def families() -> list[tuple[str, str]]:
    """Model types and the classes that generate, of all that transformers has; the encoder-decoder
    first where there are several."""
    found = {
        (model_type, name if isinstance(name, str) else name[0]): None
        for mapping in MAPPINGS
        for model_type, name in mapping.items()
    }
    return sorted(found, key=lambda pair: pair[0])


def tiny_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """The first of the family's classes, with random weights of ``seed``; ``fields`` change its
    configuration."""
    name = next(name for one, name in families() if one == model_type)
    return _model(_config(model_type, name, **fields), name, seed)


def row_of(store: KVStore, model_type: str, name: str) -> Row:
    """Tries one family."""
    try:
        config = _config(model_type, name)
    except Exception as error:
        return Row(model_type, name, "", _not_tried(error))
    try:
        cache = OffloadedKVCache(store, config)
    except ShapeMismatch as error:
        return Row(model_type, name, _kinds(config), f"refused: {error}")
    try:
        return Row(model_type, name, _kinds(config), _verdict(cache, config, name))
    finally:
        cache.close()


def _config(model_type: str, name: str, **fields: Any) -> Any:
    # Some families have a class for their text alone, with a configuration of its own.
    kind = getattr(transformers, name).config_class or CONFIG_MAPPING[model_type]
    return shrunk(kind, EXTRA.get(kind.model_type, {}) | fields)


def _verdict(cache: OffloadedKVCache, config: Any, name: str) -> str:
    try:
        model = _model(config, name)
        wanted = _generate(model, _whole(DynamicCache(config=config), config))
    except Exception as error:
        return _not_tried(error)
    try:
        found = _generate(model, _whole(cache, config))
    except SpdkKvError as error:
        return f"wrong: {type(error).__name__}: {error}"
    if cache.get_seq_length() == 0:
        return "wrong: the model left the cache empty"
    same = torch.equal(found.sequences, wanted.sequences) and all(
        torch.equal(ours, theirs) for ours, theirs in zip(found.logits, wanted.logits, strict=True)
    )
    if any(logits.isnan().any() for logits in wanted.logits):
        return "not tried: its logits are not numbers"
    return "bit-equal" if same else "wrong: other logits"


def _whole(cache: Any, config: Any) -> Any:
    wrap = config.is_encoder_decoder or config.model_type in CROSS_ATTENTION
    return EncoderDecoderCache(cache, DynamicCache()) if wrap else cache


def _model(config: Any, name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > BIG:
        raise ValueError("it cannot be built small")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _generate(model: Any, cache: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(
        **inputs_of(model),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    special = INPUTS.get(model.config.model_type)
    if special is not None:
        torch.manual_seed(1)
        return special(model.config)
    ids = torch.randint(4, VOCABULARY - 4, (2, 13), generator=torch.manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _kinds(config: Any) -> str:
    """What the layers of DynamicCache keep."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:
        return ""
    return ", ".join(sorted({KINDS.get(type(layer).__name__, "other") for layer in layers}))


def _not_tried(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"not tried: {type(error).__name__}: {text[:120]}"
