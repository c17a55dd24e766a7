"""What K and V were computed by: the fingerprint of a model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from spdk_kv.integrations.transformers.weights import Undigestible, weights_digest

log = logging.getLogger(__name__)

# Fields of a configuration that change no key and no value, given the weights. Any other counts,
# also one that only a later release of transformers has.
# fmt: off
_IRRELEVANT = frozenset((
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "dtype",
    "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "torchscript", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "_experts_implementation",
    "_experts_implementation_internal", "_commit_hash", "pad_token_id", "bos_token_id",
    "eos_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "tokenizer_class", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "initializer_range", "initializer_factor", "chunk_size_feed_forward", "gradient_checkpointing",
    "router_aux_loss_coef", "aux_loss_alpha", "classifier_dropout", "max_length", "min_length",
    "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty",
    "id2label", "label2id",
))
# fmt: on
# Frequencies that stay the same however long the text gets. With any other kind, K of a token
# depends on how long the text was when it was computed.
_STATIC_ROPE = frozenset(("default", "linear", "llama3", "yarn", "proportional", "mrope"))
# Models whose prompt attends to itself in both directions, whatever their configuration says.
_TWO_WAY = frozenset(("paligemma", "hrm_text"))

_ABSENT = "absent"


@dataclass(frozen=True)
class Identity:
    """What K and V of a text depend on, beside the text.

    Attributes:
        weights: Digest of the weights; None where they were not checked.
        config: The fields of the model's configuration that count.
        dtype: Of the weights.
        windows: For each layer with a cache, how many tokens its attention sees, or None for all.
        adapters: The adapters (LoRA and the like) in use, and whether and how.
        tag: What the caller wants to tell apart.
        release: Of transformers; not part of the fingerprint.
    """

    weights: str | None
    config: Mapping[str, Any]
    dtype: str | None
    windows: tuple[int | None, ...]
    adapters: tuple[str, ...]
    tag: str | None
    release: str

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, equal for what computes the same K and V."""
        fields = asdict(self)
        del fields["release"]
        return hashlib.blake2b(_json(fields).encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Identity:
        """What :meth:`to_json` made. KeyError and TypeError where it made something else."""
        windows, adapters = tuple(fields["windows"]), tuple(fields["adapters"])
        return cls(**{**fields, "windows": windows, "adapters": adapters})

    def differences(self, stored: Identity) -> list[str]:
        """What ``stored`` has differently, in words; empty where the fingerprint is the same."""
        found = [
            f"{name} was {was!r}, not {now!r}"
            for name in ("tag", "dtype", "windows", "adapters")
            if (was := getattr(stored, name)) != (now := getattr(self, name))
        ]
        was, now = dict(_flat(stored.config)), dict(_flat(self.config))
        for name in sorted(was.keys() | now.keys()):
            before, after = was.get(name, _ABSENT), now.get(name, _ABSENT)
            if before != after:
                found.append(f"config.{name} was {before}, not {after}")
        if stored.weights != self.weights:
            found.append("the weights are others")
        return found


def identity_of(model: Any, windows: tuple[int | None, ...], tag: str | None = None) -> Identity:
    """The identity of a model, or (without weights) of a bare configuration.

    Reads every weight once per process. Weights that have no values here (the meta device) are
    not checked, as with a bare configuration.
    """
    config = config_of(model)
    fields = _relevant(config.to_dict())
    weights = dtype = None
    adapters: tuple[str, ...] = ()
    if isinstance(model, nn.Module):
        root = root_of(model)
        dtype = _dtype(root)
        adapters = tuple(_adapters(root))
        try:
            weights = weights_digest(root, static_rope=length_limit(config) is None)
        except Undigestible as error:
            log.warning("the weights of %s are not checked: %s", type(root).__name__, error)
    return Identity(weights, fields, dtype, windows, adapters, tag, transformers.__version__)


def config_of(model: Any) -> Any:
    """The configuration of ``model``, which may be one itself."""
    return root_of(model).config if isinstance(model, nn.Module) else model


def root_of(model: nn.Module) -> nn.Module:
    """The transformers model in ``model``: within what torch.compile or adapters put around it."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def length_limit(config: Any) -> int | None:
    """From how many tokens on K of a token depends on how long the text was when it was computed;
    None where it never does."""
    limits = [
        int(rope.get("original_max_position_embeddings") or longest or 0)
        for rope, longest in _ropes(config.to_dict(), 0)
        if str(rope.get("rope_type", rope.get("type", "default"))) not in _STATIC_ROPE
    ]
    return min(limits, default=None)


def why_unmatchable(config: Any) -> str | None:
    """Why no text of the model can be found again by its beginning, or None if it can."""
    text = config.get_text_config(decoder=True)
    two_way = getattr(text, "use_bidirectional_attention", None)
    if getattr(config, "is_encoder_decoder", False):
        return "the tokens of an encoder-decoder depend on the encoder's input"
    if two_way not in (None, False, "vision") or {config.model_type, text.model_type} & _TWO_WAY:
        return f"tokens of {config.model_type} depend on later ones"
    return None


def has_dropout(config: Any) -> bool:
    """Whether some layer drops values while it is trained."""
    return any(
        isinstance(value, float) and value > 0
        for name, value in _flat(config.to_dict())
        if "drop" in name
    )


def _relevant(fields: Any) -> Any:
    if isinstance(fields, Mapping):
        kept = {
            str(name): _relevant(value)
            for name, value in fields.items()
            if name not in _IRRELEVANT and "dropout" not in str(name)
        }
        return dict(sorted(kept.items()))
    if isinstance(fields, list | tuple | set | frozenset):
        return [_relevant(value) for value in fields]
    if fields is None or isinstance(fields, bool | int | float | str):
        return fields
    return str(fields)


def _ropes(fields: Any, longest: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The RoPE parameters within a configuration, each with its max_position_embeddings."""
    if isinstance(fields, Mapping):
        longest = fields.get("max_position_embeddings") or longest
        if "rope_type" in fields or ("type" in fields and "factor" in fields):
            yield fields, longest
        for value in fields.values():
            yield from _ropes(value, longest)


def _adapters(model: nn.Module) -> Iterator[str]:
    """How the adapters of peft, whose weights are the model's, are set: each setting once."""
    found = set()
    for module in model.modules():
        state = vars(module)
        if "_active_adapter" in state or "_disable_adapters" in state:
            fields = {
                "active": _relevant(state.get("_active_adapter")),
                "disabled": bool(state.get("_disable_adapters")),
                "merged": _relevant(state.get("merged_adapters")),
                "scaling": _relevant(state.get("scaling")),
            }
            found.add(_json(fields))
    yield from sorted(found)


def _dtype(model: nn.Module) -> str | None:
    kinds = (each.dtype for each in model.parameters())
    dtype = next((kind for kind in kinds if kind.is_floating_point), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _flat(fields: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(fields, Mapping):
        for name, value in fields.items():
            yield from _flat(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, fields


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
