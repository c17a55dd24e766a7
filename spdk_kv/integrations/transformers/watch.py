"""Sees which tokens a model is given along with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from spdk_kv.integrations.transformers.hook import CacheHook, ended_with, if_given
from spdk_kv.integrations.transformers.identity import (
    config_of,
    has_dropout,
    length_limit,
    root_of,
    why_unmatchable,
)
from spdk_kv.integrations.transformers.text import PADDING, Ids

# What a forward pass may be given without changing any key or value; what is checked below; and
# the cache. Anything else makes the text unknown.
_HARMLESS = frozenset(
    (
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
        "num_logits_to_keep",
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "input_ids",
        "attention_mask",
        "position_ids",
        "cache_position",
        "cache",
        "past_key_values",
    )
)
# They tell kinds of tokens apart; all 0 where there is text only.
_KINDS = frozenset(("token_type_ids", "mm_token_type_ids"))


@dataclass(frozen=True)
class Pass:
    """What a forward pass adds after ``past`` tokens.

    ``ids``: ``[tokens, rows]``, with :data:`PADDING` where they are masked out; or None, and
    ``why`` says why they are not known. ``padding``: for each row, how many of the ``past`` tokens
    are masked out.
    """

    past: int
    ids: Ids | None
    padding: Ids = field(default_factory=lambda: np.zeros(0, "<u4"))
    why: str = ""


class Watched(Protocol):
    """Who is told of the passes that a cache goes through."""

    def announce(self, coming: Pass) -> None: ...
    def retract(self) -> None: ...
    def complete(self) -> None: ...


class UnknownTokens(Exception):
    """The tokens cannot be known; says why."""


def watch(model: nn.Module, cache: Any, watched: Watched) -> Callable[[], object]:
    """From now on ``watched`` is told, before each forward pass of ``model`` that is given
    ``cache``, what the pass adds to it, and afterwards that it is over, and whether it raised.

    Returns what ends this; it ends by itself when the cache is gone.
    """
    before = CacheHook(cache, if_given(partial(_announce, watched)))
    after = CacheHook(cache, if_given(partial(_retract, watched)))
    done = CacheHook(cache, if_given(partial(_complete, watched)))
    root = root_of(model)
    handles = (
        root.register_forward_pre_hook(before, with_kwargs=True),
        root.register_forward_hook(after, with_kwargs=True, always_call=True),
        root.register_forward_hook(done, with_kwargs=True),
    )
    return ended_with(cache, handles)


def _announce(watched: Watched, cache: Any, model: nn.Module, args: Any, kwargs: Any) -> None:
    past = cache.get_seq_length()
    try:
        given = _by_name(model, args, kwargs)
        ids = _ids(model, given, past)
        coming = Pass(past, ids, _masked_out(given, past, ids.shape[1]))
    except UnknownTokens as reason:
        coming = Pass(past, None, why=str(reason))
    watched.announce(coming)


def _retract(watched: Watched, *_: object) -> None:
    watched.retract()


def _complete(watched: Watched, *_: object) -> None:
    watched.complete()


def _by_name(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    try:
        named = inspect.signature(model.forward).bind_partial(*args).arguments
        return {**named, **kwargs}
    except (TypeError, ValueError) as error:
        raise UnknownTokens(f"arguments without a name: {error}") from error


def _ids(model: nn.Module, given: Mapping[str, Any], past: int) -> Ids:
    """The tokens that a pass adds. UnknownTokens where K and V may depend on anything else."""
    config = config_of(model)
    if why := why_unmatchable(config):
        raise UnknownTokens(why)
    if model.training and has_dropout(config):
        raise UnknownTokens("the model is being trained, with dropout")
    for name, value in given.items():
        if name in _HARMLESS or value is None or value is False:
            continue
        if not (name in _KINDS and isinstance(value, torch.Tensor) and not value.any()):
            raise UnknownTokens(f"the model was given {name}")
    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise UnknownTokens("the model was not given input_ids")
    rows, count = ids.shape
    limit = length_limit(config)
    if limit is not None and past + count >= limit:
        raise UnknownTokens(
            f"with this kind of RoPE, K depends on the length from {limit} tokens on"
        )
    found = tokens_of(ids, given.get("attention_mask"), past)
    _check_positions(given, found, past, rows, count)
    return found


def tokens_of(ids: torch.Tensor, mask: torch.Tensor | None, past: int = 0) -> Ids:
    """``[tokens, rows]`` of what follows ``past`` tokens, :data:`PADDING` where it is masked out.

    Args:
        ids: ``[rows, tokens]``.
        mask: ``[rows, past + tokens]``, 0 for what is padded, on the left of each row.

    Raises:
        UnknownTokens: The mask has another shape, or masks something else; or ids are out of range.
    """
    found = np.array(ids.detach().cpu().numpy().T, np.int64, order="C")
    if found.size and not 0 <= found.min() <= found.max() < PADDING:
        raise UnknownTokens("input_ids are not numbers of tokens")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != (len(ids), past + len(found)):
            raise UnknownTokens(
                "attention_mask does not have one number for each token of each row"
            )
        seen = mask.detach().cpu().numpy().T != 0
        if (seen[1:] < seen[:-1]).any():
            raise UnknownTokens("attention_mask masks more than padding on the left")
        found[~seen[past:]] = PADDING
    return found.astype("<u4")


def _check_positions(
    given: Mapping[str, Any], found: Ids, past: int, rows: int, count: int
) -> None:
    """UnknownTokens unless each row's tokens are counted from its first one that is not padded."""
    numbers = np.arange(past, past + count)
    cache_position = given.get("cache_position")
    if cache_position is not None and not np.array_equal(_numpy(cache_position), numbers):
        raise UnknownTokens("cache_position is not that of the next tokens")
    padding = _masked_out(given, past + count, rows)[:, None].astype(np.int64)
    positions = given.get("position_ids")
    if positions is None:
        if np.any(padding):
            raise UnknownTokens("padded rows came without position_ids, which generate() gives")
        return
    # Some models give several kinds of positions, which are the same for text.
    planes = _numpy(positions)
    if planes.shape[-1] != count or planes.ndim not in (2, 3):
        raise UnknownTokens("position_ids have a shape of their own")
    wrong = planes != numbers - padding
    if (wrong & np.broadcast_to((found != PADDING).T, (*wrong.shape[:-2], rows, count))).any():
        raise UnknownTokens("position_ids are not those of one text from its beginning")


def _masked_out(given: Mapping[str, Any], tokens: int, rows: int) -> Ids:
    """For each row, how many of its first ``tokens`` are masked out."""
    mask = given.get("attention_mask")
    if mask is None:
        return np.zeros(rows, "<u4")
    return np.asarray((_numpy(mask)[:, :tokens] == 0).sum(axis=1), "<u4")


def _numpy(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(tensor.detach().cpu() if isinstance(tensor, torch.Tensor) else tensor)
