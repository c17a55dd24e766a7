"""Low-rank adapters of a model's keys, fitted to texts that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import DynamicCache

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT
from spdk_kv.integrations.transformers.dimensions import whole_layers
from spdk_kv.sparse.adapters import GramMatrix

# One forward pass: bounds what activations take of memory.
_SLICE_TOKENS = 512
# K and V of a text that are in memory at once. Longer texts begin anew after as many tokens.
_WINDOW_TOKENS = 32768

Seen = Callable[[int, torch.Tensor], None]
Advance = Callable[[int], None]


class _WatchedCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache that shows the keys of a layer, after RoPE, as they come."""

    def __init__(self, config: Any, seen: Seen) -> None:
        super().__init__(config=config)
        self._seen = seen

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._seen(layer_idx, key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def gather_keys(
    model: Any, texts: Iterable[list[int]], *, advance: Advance | None = None
) -> dict[int, GramMatrix]:
    """Lets ``model`` read ``texts``, and gathers the keys of the layers that attend to all tokens.

    Blocks. Of K and V no more is kept than those of one text.

    Args:
        model: a causal language model of transformers.
        texts: token ids, each from the beginning of its text.
        advance: called with the tokens of each forward pass.

    Returns:
        By number of the layer.

    Raises:
        ShapeMismatch: the model has no such layer.
        ValueError: keys are not finite; names the layer.
    """
    config = model.config.get_text_config(decoder=True)
    gathered = {number: GramMatrix() for number in whole_layers(config)}

    def seen(number: int, k: torch.Tensor) -> None:
        if number in gathered:
            try:
                gathered[number].add(k)
            except ValueError as wrong:
                raise ValueError(f"layer {number}: {wrong}") from wrong

    longest = min(_WINDOW_TOKENS, getattr(config, "max_position_embeddings", _WINDOW_TOKENS))
    for text in texts:
        for begin in range(0, len(text), longest):
            _read(model, text[begin : begin + longest], _WatchedCache(config, seen), advance)
    return {number: each for number, each in gathered.items() if each.tokens}


def _read(model: Any, text: list[int], cache: DynamicCache, advance: Advance | None) -> None:
    ids = torch.tensor([text], device=model.device)
    with torch.inference_mode():
        for begin in range(0, len(text), _SLICE_TOKENS):
            piece = ids[:, begin : begin + _SLICE_TOKENS]
            # Without the head on top, which would compute a row of logits per token.
            model.base_model(input_ids=piece, use_cache=True, **{CACHE_ARGUMENT: cache})
            if advance is not None:
                advance(piece.shape[1])
