"""The tokens of a batch from before its rows became others: they stay where they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from spdk_kv.integrations.transformers.lifetime import delete_in_thread
from spdk_kv.sequence import Sequence

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Stretch:
    """The first ``tokens`` of ``sequence``, of whose rows the batch has ``rows``."""

    sequence: Sequence
    rows: tuple[int, ...]
    tokens: int

    def picked(self, rows: Rows[int]) -> Stretch:
        """The batch becomes the ``rows`` of what it was."""
        return Stretch(self.sequence, tuple(self.rows[row] for row in rows), self.tokens)


class Earlier:
    """What a stream's sequence does not have itself, because its batch had other rows then.

    A batch that gets another number of rows (several answers to one prompt, beams that end) goes on
    in a new sequence. What came before is read from where it is, once for all rows. For one thread
    at a time.
    """

    def __init__(self) -> None:
        self.stretches: tuple[Stretch, ...] = ()
        """Replaced as a whole, so that an interrupt leaves it as it was or as it is to be."""
        self._finalizers: dict[str, weakref.finalize[[Sequence], Earlier]] = {}

    def _keep(self, sequence: Sequence) -> None:
        """It goes with this object, if nobody deletes it before."""
        if sequence.name not in self._finalizers:
            gone = weakref.finalize(self, delete_in_thread, sequence)
            gone.atexit = False  # closing the store deletes it
            self._finalizers[sequence.name] = gone

    @property
    def tokens(self) -> int:
        """Tokens per row in all."""
        return sum(each.tokens for each in self.stretches)

    def grown(self, sequence: Sequence, rows: Rows[int], tokens: int) -> tuple[Stretch, ...]:
        """What :attr:`stretches` is to be, with the ``tokens`` of ``sequence`` behind them; of the
        batch the ``rows`` are left."""
        earlier = [each.picked(rows) for each in self.stretches]
        if tokens:
            self._keep(sequence)
            earlier.append(Stretch(sequence, tuple(rows), tokens))
        return tuple(earlier)

    def forked(self, tokens: int, into: Earlier) -> tuple[Stretch, ...]:
        """The first ``tokens`` of it, in sequences that go with ``into``. May block on the
        drive."""
        made: list[Stretch] = []
        for each in self.stretches:
            count = min(each.tokens, tokens)
            if count:
                fork = each.sequence.fork(tokens=count)
                into._keep(fork)
                made.append(Stretch(fork, each.rows, count))
            tokens -= count
        return tuple(made)

    def reorder(self, rows: Rows[int]) -> None:
        """Row ``b`` of the batch becomes what row ``rows[b]`` was."""
        self.stretches = tuple(each.picked(rows) for each in self.stretches)

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on."""
        kept: list[Stretch] = []
        for each in self.stretches:
            count = min(each.tokens, tokens)
            kept.append(Stretch(each.sequence, each.rows, count))
            tokens -= count
        self.stretches = tuple(kept)

    def prefetch(self, layer: int, first: int) -> None:
        """Starts to read the tokens of ``layer`` from ``first`` on. Does not wait."""
        for each in self.stretches:
            if first < each.tokens:
                each.sequence.prefetch([layer], first_token=max(0, first), spare_tokens=0)
            first -= each.tokens

    def read(self, layer: int, first: int, device: torch.device | None) -> list[Pair]:
        """K and V of the tokens of ``layer`` from ``first`` on, as the batch has them, in parts
        that follow each other. Blocks on the drive."""
        parts: list[Pair] = []
        for each in self.stretches:
            if first < each.tokens:
                wanted = slice(max(0, first), each.tokens)
                k, v = each.sequence.read(layer, tokens=wanted, device=device)
                rows = torch.tensor(each.rows, device=k.device)
                parts.append((k.index_select(0, rows), v.index_select(0, rows)))
            first -= each.tokens
        return parts

    def read_on(
        self, sequence: Sequence, layer: int, first: int, device: torch.device | None
    ) -> Pair:
        """As :meth:`read`, and behind that the tokens of ``sequence``, in one."""
        parts, before = self.read(layer, first, device), self.tokens
        if not parts or sequence.tokens(layer):
            rest = slice(max(0, first - before), None)
            parts.append(sequence.read(layer, tokens=rest, device=device))
        return _joined(parts)

    def let_go(self) -> None:
        """Its sequences are deleted."""
        for gone in self._finalizers.values():
            gone.detach()
        self._finalizers.clear()


def _joined(parts: list[Pair]) -> Pair:
    """``parts`` one after the other."""
    if len(parts) == 1:
        return parts[0]
    k, v = (torch.cat(half, dim=2) for half in zip(*parts, strict=True))
    return k, v
