"""A model that attends to a part of its text, with all of K and V in memory.

An attention function of transformers: everything but the softmax is the model's own code. K and V
of a text are computed once and shared by all rows of a batch, each of which goes on with its own
question and answer. Questions attend to everything; a step of an answer attends to the groups that
the `Selector` of each layer chose by the predicted query, to the newest tokens and to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from spdk_kv.sparse import Selector, Settings, norm_of, predict

NAME = "masked"
ELEMENT_NBYTES = 2  # K and V would be kept in bfloat16, whatever this experiment computes in
_SLICE = 512  # tokens of a prompt that are computed at once


@dataclass
class LayerKV:
    """K and V of one layer: those of the text, and those of each row after it.

    ``text``: 2 x [tokens, kv_heads, head_dim]. ``rows``: 2 x [batch, tokens, kv_heads, head_dim].
    """

    text: tuple[torch.Tensor, torch.Tensor]
    rows: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def tokens(self) -> int:
        return self.text[0].shape[0] + (0 if self.rows is None else self.rows[0].shape[1])

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """``k`` and ``v``: [batch, kv_heads, tokens, head_dim]."""
        new = (k.transpose(1, 2), v.transpose(1, 2))
        if self.rows is None:
            self.rows = new
        else:
            self.rows = tuple(torch.cat(pair, dim=1) for pair in zip(self.rows, new, strict=True))

    def gather(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [batch, kv_heads, n, head_dim] of ``tokens`` [batch, n]."""
        assert self.rows is not None
        own = self.rows[0].shape[1]
        text = self.text[0].shape[0]
        of_text = tokens.clamp(max=text - 1)
        later = torch.nonzero(tokens >= text, as_tuple=True)
        of_rows = later[0] * own + tokens[later] - text
        found = []
        for whole, rows in zip(self.text, self.rows, strict=True):
            one = whole[of_text]
            one[later] = rows.flatten(0, 1)[of_rows]
            found.append(one.transpose(1, 2))
        return found[0], found[1]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: Any = None
) -> torch.Tensor:
    """Attention of grouped queries: [batch, heads, t, head_dim] and [batch, kv_heads, n, ...]."""
    found: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found


@dataclass
class Trace:
    """What a run selected: ``groups[step][layer]`` int64 [batch, count]."""

    groups: list[list[np.ndarray]] = field(default_factory=list)


class MaskedModel:
    """``model`` with the attention function of this file, and the K/V of one text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._own = model.config._attn_implementation
        AttentionInterface.register(NAME, self._attention)
        model.set_attn_implementation(NAME)
        self.layers = model.model.layers
        self._kv: list[LayerKV] = []
        self._how: Callable[..., torch.Tensor] = self._everything
        self._selectors: list[Selector] | None = None
        self._picked: list[np.ndarray | None] = [None] * len(self.layers)
        self._asked: list[torch.Tensor | None] = [None] * len(self.layers)
        self._previous: list[torch.Tensor | None] = [None] * len(self.layers)
        self._settings: Settings | None = None
        self._trace = Trace()
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._entering, number), with_kwargs=True)

    @contextmanager
    def as_it_is(self) -> Iterator[Any]:
        """The model with the attention that it had before, as long as the block lasts."""
        self._selectors = None
        self.model.set_attn_implementation(self._own)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(NAME)

    @property
    def group_token_nbytes(self) -> int:
        """Bytes of K and V of a token of one layer on the drive."""
        config = self.model.config
        return 2 * config.num_key_value_heads * self.layers[0].self_attn.head_dim * ELEMENT_NBYTES

    def prefill(self, text: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of every layer of ``text`` [tokens], computed in slices; see `LayerKV`."""
        self._kv, self._how, self._selectors = [], self._collecting, None
        self._collected: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.layers]
        for begin in range(0, len(text), _SLICE):
            self._forward(text[None, begin : begin + _SLICE], begin)
        return [
            tuple(torch.cat([pair[side] for pair in pairs], dim=2)[0].transpose(0, 1).contiguous()
                  for side in (0, 1))
            for pairs in self._collected
        ]  # fmt: skip

    def load(self, text: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Goes on after a text: what `prefill` returned."""
        self._kv = [LayerKV(pair) for pair in text]

    def ask(self, questions: torch.Tensor) -> None:
        """Reads ``questions`` [batch, tokens] after the text, attending to everything."""
        self._how, self._selectors = self._everything, None
        for layer in self._kv:
            layer.rows = None
        self._forward(questions, self._kv[0].tokens)

    def kept(self) -> list[LayerKV]:
        """The K/V after `ask`, to go back to with `back`."""
        return [LayerKV(layer.text, layer.rows) for layer in self._kv]

    def back(self, kept: Sequence[LayerKV]) -> None:
        self._kv = [LayerKV(layer.text, layer.rows) for layer in kept]

    def dense(self, answers: torch.Tensor) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] that predict ``answers`` [batch, tokens] each from the
        answer before it, the first one left out (it is the question's); attends to everything."""
        self._how, self._selectors = self._everything, None
        return torch.stack([self._step(answers, at) for at in range(answers.shape[1] - 1)], dim=1)

    def sparse(
        self, answers: torch.Tensor, settings: Settings, selectors: list[Selector]
    ) -> tuple[torch.Tensor, Trace]:
        """As `dense`, attending to a part. ``selectors``: one per layer, which know the keys."""
        self._how, self._settings, self._selectors = self._selected, settings, selectors
        self._trace = Trace()
        self._previous = list(self._asked)
        steps = []
        for at in range(answers.shape[1] - 1):
            self._trace.groups.append([])
            steps.append(self._step(answers, at))
        return torch.stack(steps, dim=1), self._trace

    def _step(self, answers: torch.Tensor, at: int) -> torch.Tensor:
        return self._forward(answers[:, at : at + 1], self._kv[0].tokens)[:, -1]

    def _forward(self, ids: torch.Tensor, begin: int) -> torch.Tensor:
        positions = torch.arange(begin, begin + ids.shape[1])[None].expand(len(ids), -1)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits
        return logits

    def _attention(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any,
        scaling: float, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        return self._how(module.layer_idx, q, k, v, scaling).transpose(1, 2), None

    def _collecting(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        pairs = self._collected[layer]
        pairs.append((k, v))
        k, v = (torch.cat([pair[side] for pair in pairs], dim=2) for side in (0, 1))
        own = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return attend(q, k, v, scale, own.tril(k.shape[2] - q.shape[2]))

    def _everything(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The text is the same for all rows: their queries attend to it as if they were of one
        row, and both softmaxes are joined by their sums."""
        held = self._kv[layer]
        held.append(k, v)
        assert held.rows is not None
        if q.shape[2] > 1:
            self._asked[layer] = q[:, :, -1]
        batch, heads, new, width = q.shape
        tail_k, tail_v = (one.transpose(1, 2) for one in held.rows)
        kv_heads, tail = tail_k.shape[1], tail_k.shape[2]
        grouped = q.reshape(batch, kv_heads, -1, width)  # heads of a group, then tokens
        text_k, text_v = (one.transpose(0, 1) for one in held.text)
        joined = grouped.transpose(0, 1).reshape(kv_heads, -1, width)
        of_text = (joined @ text_k.transpose(1, 2)).mul_(scale)
        of_tail = (grouped @ tail_k.transpose(2, 3)).mul_(scale)
        own = torch.ones(new, tail, dtype=torch.bool).tril(tail - new)
        of_tail = of_tail.view(batch, kv_heads, -1, new, tail).masked_fill(~own, -torch.inf)
        of_tail = of_tail.reshape(batch, kv_heads, -1, tail)
        of_text = of_text.view(kv_heads, batch, -1, text_k.shape[1]).transpose(0, 1)
        top = torch.maximum(of_text.amax(-1, keepdim=True), of_tail.amax(-1, keepdim=True))
        of_text, of_tail = (of_text - top).exp_(), (of_tail - top).exp_()
        total = of_text.sum(-1, keepdim=True) + of_tail.sum(-1, keepdim=True)
        flat = of_text.transpose(0, 1).reshape(kv_heads, -1, text_k.shape[1])
        out = (flat @ text_v).view(kv_heads, batch, -1, width).transpose(0, 1) + of_tail @ tail_v
        return (out / total).reshape(batch, heads, new, width)

    def _selected(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        assert self._selectors is not None
        assert self._settings is not None
        held, selector = self._kv[layer], self._selectors[layer]
        size, before = self._settings.group_tokens, held.tokens
        whole = self._settings.whole_groups(before)
        groups = self._picked[layer]
        if groups is None:
            groups = selector.select(q[:, :, 0], whole_groups=whole)
        self._picked[layer] = None
        self._trace.groups[-1].append(groups)
        held.append(k, v)
        selector.append(k)
        self._previous[layer] = q[:, :, 0]
        chosen = (groups[:, :, None] * size + np.arange(size)).reshape(len(groups), -1)
        newest = np.tile(np.arange(whole * size, before + 1), (len(groups), 1))
        return attend(q, *held.gather(torch.from_numpy(np.concatenate([chosen, newest], 1))), scale)

    def _entering(self, number: int, _: Any, args: Any, kwargs: Any) -> None:
        """Before layer ``number`` is computed: selects for the one after it."""
        following = number + 1
        if self._selectors is None or following == len(self.layers):
            return
        assert self._settings is not None
        this, layer = self.layers[number], self.layers[following]
        norm = norm_of(self._settings.predictor, this.input_layernorm, layer.input_layernorm)
        if norm is None:
            q = self._previous[following]
        else:
            hidden = args[0] if args else kwargs["hidden_states"]
            cos, sin = kwargs["position_embeddings"]
            attention, width = layer.self_attn, layer.self_attn.head_dim
            q = predict(
                hidden,
                norm=norm,
                project=lambda x: attention.q_proj(x).unflatten(2, (-1, width)).transpose(1, 2),
                rotate=lambda q: apply_rotary_pos_emb(q, q, cos, sin)[0],
            )
        assert q is not None
        whole = self._settings.whole_groups(self._kv[following].tokens)
        self._picked[following] = self._selectors[following].select(q, whole_groups=whole)
