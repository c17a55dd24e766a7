"""Finds how a model makes its queries, by a forward pass of a few tokens in which they are seen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.transformers.sparse.projection import Rope, ways
from spdk_kv.integrations.transformers.sparse.structure import (
    Found,
    Query,
    RopeKey,
    Structure,
    attention_layers,
    normed,
    refused,
)

# RoPE leaves the token at position 0 as it is, and the embedding of padding is 0.
_TOKENS = 4
_IMPLEMENTATION = "spdk_kv_trial"

_structures: weakref.WeakKeyDictionary[nn.Module, Structure] = weakref.WeakKeyDictionary()
_local = threading.local()


@dataclass
class _Layer:
    """What was seen of one layer."""

    hidden: torch.Tensor | None = None
    rope: Rope | None = None
    normed: torch.Tensor | None = None
    masked: bool = False
    query: torch.Tensor | None = None
    scaling: float | None = None


@dataclass
class _Trial:
    layers: dict[int, _Layer] = field(default_factory=dict)
    ropes: dict[RopeKey, Rope] = field(default_factory=dict)
    rotary: list[nn.Module] = field(default_factory=list)


def structure_of(root: nn.Module, name: str, whole: Iterable[int]) -> Structure:
    """How the queries of the layers ``whole``, which attend to all tokens, are made.

    Runs the model on a few tokens, once per process; not while it is used in another thread.

    Raises:
        ShapeMismatch: They are not made in a way that is known here; says what is missing.
    """
    known = _structures.get(root)
    if known is None or not set(whole) <= set(known.queries):
        known = _tried(root, name, frozenset(whole))
        if known.owner is not root:  # or the table would keep the model alive
            _structures[root] = known
    return known


def _tried(root: nn.Module, name: str, whole: frozenset[int]) -> Structure:
    owner, decoders, layers = attention_layers(root, name)
    missing = sorted(whole - set(layers))
    if missing:
        raise refused(name, f"layer {missing[0]} has no attention with a q_proj or qkv_proj")
    trial = _run(root, name, owner, layers)
    queries = {number: _query(name, layers[number], trial, number) for number in sorted(whole)}
    return Structure(owner, decoders, tuple(trial.rotary), layers, queries)


def _query(name: str, found: Found, trial: _Trial, number: int) -> Query:
    seen = trial.layers[number]
    if seen.query is None or seen.hidden is None or seen.normed is None or not seen.masked:
        raise refused(name, f"the query of layer {number} does not come by transformers' interface")
    if not _same(normed(found.decoder, seen.hidden), seen.normed):
        raise refused(name, f"layer {number} does more than a norm before its attention")
    rope = _key_of(seen.rope, trial.ropes)
    _, heads, _, head_dim = seen.query.shape
    for way in ways(found.attention, heads, head_dim):
        if way.rope != "none" and rope is None:
            continue
        with suppress(RuntimeError, ValueError, TypeError):  # shapes that do not go together
            if _same(way(seen.normed, seen.rope), seen.query):
                scaling = head_dim**-0.5 if seen.scaling is None else float(seen.scaling)
                return Query(way, None if way.rope == "none" else rope, scaling)
    raise refused(name, f"layer {number} makes its query in a way that is not known here")


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float(), wanted.float()
    # Parts of a fused projection are rounded otherwise than the whole.
    return bool((found - wanted).abs().max() <= 0.02 * wanted.abs().max())


def _key_of(rope: Rope | None, ropes: dict[RopeKey, Rope]) -> RopeKey | None:
    if rope is None:
        return None
    for key, (cos, sin) in ropes.items():
        if torch.equal(cos, rope[0]) and torch.equal(sin, rope[1]):
            return key
    return None


# -- the pass ------------------------------------------------------------------------------------


def _run(root: nn.Module, name: str, owner: nn.Module, layers: dict[int, Found]) -> _Trial:
    trial = _Trial({number: _Layer() for number in layers})
    embedding: Any = root.get_input_embeddings()  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise refused(name, "its input is not one text of tokens")
    ids = (torch.arange(_TOKENS, device=weight.device) % weight.shape[0])[None]
    with _watching(trial, owner, layers), _captured(trial, layers), torch.no_grad():
        try:
            root(input_ids=ids, use_cache=False)
        except SpdkKvError:
            raise
        except Exception as error:
            raise refused(
                name, f"a trial pass over {_TOKENS} tokens failed ({type(error).__name__}: {error})"
            ) from error
    return trial


@contextmanager
def _watching(trial: _Trial, owner: nn.Module, layers: dict[int, Found]) -> Iterator[None]:
    handles = []

    def entering(number: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trial.layers[number].hidden = hidden_of(args, kwargs)
            rope = kwargs.get("position_embeddings")
            trial.layers[number].rope = tuple(rope) if _is_rope(rope) else None  # type: ignore[arg-type]

        return look

    def attending(number: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trial.layers[number].normed = hidden_of(args, kwargs)
            trial.layers[number].masked = "attention_mask" in kwargs

        return look

    def turning(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if _is_rope(output):
            if module not in trial.rotary:
                trial.rotary.append(module)
            trial.ropes[rope_key(trial.rotary.index(module), args, kwargs)] = tuple(output)

    for number, found in layers.items():
        handles += [
            found.decoder.register_forward_pre_hook(entering(number), with_kwargs=True),
            found.attention.register_forward_pre_hook(attending(number), with_kwargs=True),
        ]
    for child in owner.children():
        if not isinstance(child, nn.ModuleList):
            handles.append(child.register_forward_hook(turning, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a layer, or its attention, was called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def rope_key(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RopeKey:
    """What tells the calls of one rotary module apart within a pass."""
    given = (*args, *kwargs.values())
    return number, tuple(each for each in given if isinstance(each, str | int))


def _is_rope(output: object) -> bool:
    return (
        isinstance(output, tuple | list)
        and len(output) == 2
        and all(isinstance(each, torch.Tensor) for each in output)
    )


@contextmanager
def _captured(trial: _Trial, layers: dict[int, Found]) -> Iterator[None]:
    """The model's attention goes to :func:`_attend` meanwhile."""
    configs = {id(config): config for each in layers.values() if (config := _config(each))}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    numbers = {id(each.attention): number for number, each in layers.items()}
    _local.trial = trial, numbers
    try:
        for config in configs.values():
            config._attn_implementation_internal = _IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        del _local.trial


def _config(found: Found) -> Any:
    return getattr(found.attention, "config", None)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attends to nothing: what comes out only has to be of the right shape."""
    trial, numbers = _local.trial
    if id(module) in numbers:
        layer = trial.layers[numbers[id(module)]]
        layer.query, layer.scaling = query, scaling
    batch, heads, tokens, _ = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
