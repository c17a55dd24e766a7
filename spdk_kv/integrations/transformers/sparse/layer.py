"""One layer of which a decode step reads a part."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np
import torch

from spdk_kv.integrations.transformers.sparse.recent import Recent
from spdk_kv.integrations.transformers.sparse.resident import Counters, Numbers, Resident
from spdk_kv.sequence import Sequence
from spdk_kv.sparse import Selector
from spdk_kv.types import LayerShape

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Chosen:
    """What the next token attends to after ``past`` tokens: ``groups``, ``[rows, count]``, in the
    slots of the same shape, and all tokens from ``newest`` on."""

    past: int
    newest: int
    groups: Numbers
    slots: Numbers
    first: Rows[int] | None

    def positions(self, group_tokens: int) -> torch.Tensor:
        """The numbers of the tokens attended to, the new one included: ``[rows, count]``."""
        old = self.groups[:, :, None] * group_tokens + np.arange(group_tokens)
        new = np.arange(self.newest, self.past + 1)
        rows = len(self.groups)
        return torch.from_numpy(
            np.concatenate([old.reshape(rows, -1), np.broadcast_to(new, (rows, len(new)))], axis=1)
        )


class PartLayer:
    """Keys to select by, the newest tokens, and the groups that are resident.

    What it holds in memory is made anew out of the sequence wherever it does not reach as far:
    after a restart, a fork, a crop or an interrupt. For one thread at a time.
    """

    def __init__(
        self, number: int, shape: LayerShape, rows: int, selector: Selector, counters: Counters
    ) -> None:
        self._number = number
        self._settings = selector.settings
        self._counters = counters
        self.selector = selector
        self._resident = Resident(number, shape, selector.settings, counters, rows)
        self._recent = Recent()
        self._chosen: Chosen | None = None
        self.last_query: torch.Tensor | None = None
        """Of the newest token, where the settings predict by it."""

    @property
    def resident_nbytes(self) -> int:
        """Bytes of K and V in memory."""
        return self._resident.nbytes + self._recent.nbytes

    # -- a decode step --------------------------------------------------------------------------

    def choose(self, sequence: Sequence, query: torch.Tensor, first: Rows[int] | None) -> None:
        """Selects groups by ``query``, ``[rows, heads, head_dim]``, for the token that comes next,
        and starts to read what is missing. ``first``: how many tokens of each row are padding.

        Blocks on the drive only where keys or newest tokens are not in memory.
        """
        self.drop()
        past = sequence.tokens(self._number)
        whole = self._settings.whole_groups(past)
        self._catch_up(sequence, past, whole, first)
        groups = self.selector.select(query, first=first, whole_groups=whole)
        slots = self._resident.bring(sequence, groups, np.arange(len(groups)))
        self._chosen = Chosen(past, whole * self._settings.group_tokens, groups, slots, first)

    def chosen(self, past: int) -> Chosen | None:
        """What was chosen for the token after ``past``."""
        found = self._chosen
        return found if found is not None and found.past == past else None

    def correct(self, sequence: Sequence, query: torch.Tensor) -> None:
        """Judges what was chosen by the true ``query``; rows in which too little of what that asks
        for was chosen get what it asks for."""
        chosen, least = self._chosen, self._settings.correction
        if chosen is None or least is None:
            return
        whole = chosen.newest // self._settings.group_tokens
        coverage, wanted = self.selector.rescore(
            query, chosen.groups, first=chosen.first, whole_groups=whole
        )
        self._counters.coverage += float(coverage.sum())
        self._counters.coverages += len(coverage)
        low = ~(coverage >= least)
        if not low.any():
            return
        self._counters.corrections += int(low.sum())
        self._chosen = None
        groups, slots = chosen.groups.copy(), chosen.slots.copy()
        groups[low] = wanted[low]
        slots[low] = self._resident.bring(sequence, groups, np.flatnonzero(low))
        self._chosen = replace(chosen, groups=groups, slots=slots)

    def attended(self, k: torch.Tensor, v: torch.Tensor, past: int) -> Pair | None:
        """What the new token ``k``, ``v`` attends to, itself included, as it was chosen; None where
        nothing was. Blocks until the reads have come; raises what the store does."""
        chosen = self.chosen(past)
        if chosen is None or k.shape[2] != 1:
            return None
        keys, values = self._resident.gather(chosen.slots)
        self._chosen = None
        self._recent.add(k, v, chosen.newest)
        new_k, new_v = self._recent.since(chosen.newest)
        self._append(k, chosen.first)
        self._count(chosen)
        device = k.device
        return _joined(keys.to(device), new_k), _joined(values.to(device), new_v)

    def took_all(
        self, keys: torch.Tensor, values: torch.Tensor, past: int, first: Rows[int] | None
    ) -> None:
        """The model attended to all tokens of the layer, ``keys`` and ``values``; those after
        ``past`` are new."""
        self.drop()
        self.selector.truncate(past)
        self._append(keys[:, :, self.selector.tokens :], first)
        tokens = keys.shape[2]
        newest = self._newest(tokens)
        self._recent.hold(keys[:, :, newest:], values[:, :, newest:], newest)

    def drop(self) -> None:
        """What was chosen is not wanted any more."""
        self._chosen = None
        self._resident.drop()

    def _count(self, chosen: Chosen) -> None:
        rows, count = chosen.groups.shape
        counters = self._counters
        counters.row_layers += rows
        newest = chosen.past + 1 - chosen.newest
        counters.selected_tokens += rows * (count * self._settings.group_tokens + newest)

    # -- what is in memory ----------------------------------------------------------------------

    def _catch_up(self, sequence: Sequence, past: int, whole: int, first: Rows[int] | None) -> None:
        newest = whole * self._settings.group_tokens
        self.selector.truncate(past)
        held = self._recent.holds(newest, past)
        begin = min(past if held else newest, self.selector.tokens)
        if held and begin == past:
            return
        k, v = sequence.read(self._number, tokens=slice(begin, past))
        self._append(k[:, :, self.selector.tokens - begin :], first)
        if not held:
            self._recent.hold(k[:, :, newest - begin :], v[:, :, newest - begin :], newest)

    def _append(self, k: torch.Tensor, first: Rows[int] | None) -> None:
        if k.shape[2]:
            self.selector.append(k.detach().cpu(), first=first)

    def _newest(self, tokens: int) -> int:
        return self._settings.whole_groups(tokens) * self._settings.group_tokens

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on."""
        self._chosen = self.last_query = None
        self._resident.truncate(tokens)
        self._recent.cut(tokens)
        self.selector.truncate(tokens)

    def select(self, rows: Rows[int]) -> None:
        """The batch becomes the ``rows`` of what it was."""
        self._chosen = None
        self._resident.select(rows)
        self._recent.select(rows)
        self.selector.reorder(rows)
        if self.last_query is not None:
            self.last_query = self.last_query[list(rows)]


def _joined(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``old`` tokens before ``new`` ones, as they lie next to each other: tokens before heads."""
    return torch.cat([old.transpose(1, 2), new.transpose(1, 2)], dim=1).transpose(1, 2)
