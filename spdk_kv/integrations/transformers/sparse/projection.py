"""How an attention module makes its query out of its input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, ``[batch, tokens, rotated]``, as the model hands them to its layers."""

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Projection:
    """One way to make the query, out of those that models have.

    Attributes:
        attention: The module; has ``q_proj``, or ``qkv_proj`` whose first part is the query.
        heads, head_dim: Of the query.
        norm: What ``q_norm`` is applied to: the elements of ``each`` head, those of ``all`` heads
            together, or nothing.
        rope: How much of a head is turned: the ``whole``, as far as the module's own function
            sees to it, the ``first`` elements only, as many as cos has, or nothing.
        rotate: The function ``apply_rotary_pos_emb`` of the module's own file.
    """

    attention: nn.Module
    heads: int
    head_dim: int
    norm: Literal["each", "all", "none"]
    rope: Literal["whole", "first", "none"]
    rotate: Rotate | None

    def __call__(self, hidden: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        """The query, ``[batch, heads, tokens, head_dim]``.

        Args:
            hidden: The module's input, ``[batch, tokens, width]``.
            rope: Of the tokens' positions; None where nothing is turned.
        """
        query = self._projected(hidden)
        if self.norm == "all":
            query = self._normed(query)
        query = query.view(*query.shape[:-1], self.heads, self.head_dim).transpose(1, 2)
        if self.norm == "each":
            query = self._normed(query)
        if self.rope == "none":
            return query
        assert rope is not None
        assert self.rotate is not None
        cos, sin = (each.to(query.device) for each in rope)
        if self.rope == "whole":
            return self.rotate(query, query[:, :1], cos, sin)[0]
        turned, left = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
        return torch.cat([self.rotate(turned, turned[:, :1], cos, sin)[0], left], dim=-1)

    def _projected(self, hidden: torch.Tensor) -> torch.Tensor:
        width = self.heads * self.head_dim
        whole: Any = getattr(self.attention, "q_proj", None)
        if whole is not None:
            return whole(hidden)  # type: ignore[no-any-return]
        fused: Any = self.attention.qkv_proj
        if type(fused) is nn.Linear:  # with adapters or quantised weights it is another class
            bias = None if fused.bias is None else fused.bias[:width]
            return functional.linear(hidden, fused.weight[:width], bias)
        return fused(hidden)[..., :width]  # type: ignore[no-any-return]

    def _normed(self, query: torch.Tensor) -> torch.Tensor:
        norm: Any = self.attention.q_norm
        return norm(query)  # type: ignore[no-any-return]


def ways(attention: nn.Module, heads: int, head_dim: int) -> Iterator[Projection]:
    """Every way in which ``attention`` may make a query of ``heads`` times ``head_dim``, the most
    common ones first."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    norms: tuple[Literal["each", "all", "none"], ...] = ("none",)
    if getattr(attention, "q_norm", None) is not None:
        norms = ("each", "all", "none")
    ropes: tuple[Literal["whole", "first", "none"], ...] = ("none",)
    if rotate is not None:
        ropes = ("whole", "first", "none")
    for norm in norms:
        for rope in ropes:
            yield Projection(attention, heads, head_dim, norm, rope, rotate)
