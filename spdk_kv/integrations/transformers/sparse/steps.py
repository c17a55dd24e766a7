"""What happens beside the model in a decode step: the next layer's query, of this one's input."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from spdk_kv.integrations.transformers.sparse.projection import Rope
from spdk_kv.integrations.transformers.sparse.stream import SparseStream
from spdk_kv.integrations.transformers.sparse.structure import Query, RopeKey, Structure, normed
from spdk_kv.sparse import norm_of


class Steps:
    """Follows the forward passes of a model with one cache; told by :class:`StepHooks`.

    While a layer is computed, the groups that the next one will want are read. Where nothing stands
    for the next one's query yet (the first layer, the first step of predictor ``previous``) it is
    the true one, and its reads are waited for.

    Args:
        structure: How the model's queries are made.
        stream: Where K/V is.
        numbers: The stream's number of each layer in the cache.
    """

    def __init__(
        self, structure: Structure, stream: SparseStream, numbers: Mapping[int, int]
    ) -> None:
        self._structure = structure
        self._stream = stream
        self._numbers = {
            number: numbers[number]
            for number in structure.queries
            if numbers[number] in stream.scalings
        }
        self._ropes: dict[RopeKey, Rope] = {}
        # Hooks are called in whatever thread uses the model, with whatever cache.
        self._thread: int | None = None

    @property
    def _active(self) -> bool:
        return self._thread == threading.get_ident()

    def begin(self, mask: object) -> None:
        """A pass begins. ``mask``: what the model was given as attention_mask."""
        self._stream.forget_choices()
        self._stream.first = _padding(mask)
        self._ropes.clear()
        self._thread = threading.get_ident()

    def end(self) -> None:
        """It is over."""
        if self._active:
            self._thread = None
            self._ropes.clear()

    def turn(self, key: RopeKey, rope: Rope) -> None:
        """A rotary module has computed ``rope``."""
        if self._active:
            self._ropes[key] = rope

    @torch.no_grad()
    def enter(self, place: int, hidden: torch.Tensor) -> None:
        """The decoder layer at ``place`` is about to be computed on ``hidden``, ``[batch, tokens,
        width]``."""
        if not self._active or hidden.shape[1] != 1:
            return
        decoders = self._structure.decoders
        own = self._numbers.get(place)
        if own is not None and self._stream.chosen(own) is None:
            query = self._query(place, normed(decoders[place], hidden))
            self._stream.choose(own, query)
        following = place + 1
        number = self._numbers.get(following)
        if number is None:
            return
        predicted = self._predicted(following, number, hidden)
        if predicted is not None:
            self._stream.choose(number, predicted)

    @torch.no_grad()
    def attend(self, place: int, hidden: torch.Tensor, mask: object) -> object:
        """The attention of the layer at ``place`` is about to be computed on ``hidden``. Returns
        the mask for what it will be given, for the ``mask`` of all tokens."""
        number = self._numbers.get(place)
        if number is None or not self._active or hidden.shape[1] != 1:
            return mask
        settings = self._stream.settings
        if settings.correction is not None or settings.predictor == "previous":
            query = self._query(place, hidden)
            self._stream.correct(number, query)
            self._stream.remember(number, query)
        if mask is None:
            return None
        chosen = self._stream.chosen(number)
        if chosen is None:
            return mask
        if not isinstance(mask, torch.Tensor):  # of a kind of attention that has its own
            self._stream.forget_choice(number)
            return mask
        return _picked(mask, chosen.positions(settings.group_tokens).to(mask.device))

    def _query(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, 1, head_dim]`` of the attention's input ``hidden``."""
        query = self._structure.queries[place]
        return query.projection(hidden, self._rope(query))

    def _predicted(self, place: int, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The query of the layer at ``place``, from the input of the one before it."""
        decoders = self._structure.decoders
        norm = norm_of(
            self._stream.settings.predictor,
            lambda x: normed(decoders[place - 1], x),
            lambda x: normed(decoders[place], x),
        )
        if norm is None:
            return self._stream.last_query(number)
        return self._query(place, norm(hidden))

    def _rope(self, query: Query) -> Rope | None:
        return None if query.rope is None else self._ropes[query.rope]


def _padding(mask: Any) -> list[int] | None:
    """How many tokens of each row are masked out before the first that is not, if that is told."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    seen = mask != 0
    begins = torch.where(seen.any(1), seen.int().argmax(1), mask.shape[1])
    first: list[int] = begins.tolist()
    return first if any(first) else None


def _picked(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of ``mask``, ``[rows, ..., tokens]``, the tokens at ``positions``, ``[rows, count]``."""
    if positions.shape[1] == mask.shape[-1]:
        return mask
    rows, count = positions.shape
    between = mask.shape[1:-1]
    index = positions.view(rows, *(1 for _ in between), count).expand(rows, *between, count)
    return mask.expand(rows, *mask.shape[1:]).gather(-1, index)
