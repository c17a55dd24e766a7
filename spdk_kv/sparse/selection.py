"""Which groups of tokens a layer attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spdk_kv._native.score import softmax_max, top_groups
from spdk_kv.sparse.keys import Keys, keys_from_state, make_keys
from spdk_kv.sparse.keys.base import Floats, State
from spdk_kv.sparse.settings import Settings
from spdk_kv.sparse.threads import in_parts

Groups = npt.NDArray[np.int64]

# A real group that cannot be scored is still chosen before padding, which has -inf.
_LOWEST = np.finfo(np.float32).min
# Multiply-adds of a score that take as long as its part in the softmax.
_SOFTMAX_COST = 30


class Selector:
    """Chooses groups of one layer by what it keeps of the keys. One thread at a time, no I/O.

    Attributes:
        settings: how.
        scale: of the layer's softmax, or None.
        keys: what is kept of the keys, see `Keys`.
    """

    def __init__(
        self, settings: Settings, adapter: Floats | None = None, *, scale: float | None = None
    ) -> None:
        """
        Args:
            settings: how groups are chosen.
            adapter: of the low-rank projection, see `LowRank`.
            scale: what the layer multiplies products of queries and keys with before its softmax;
                None: head_dim ** -0.5.
        """
        self.settings = settings
        self.scale = scale
        self.keys: Keys = make_keys(settings, adapter)

    @property
    def tokens(self) -> int:
        """How many tokens it knows, per batch row."""
        return self.keys.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the keys take."""
        return self.keys.nbytes

    def append(self, k: torch.Tensor, *, first: Sequence[int] | None = None) -> None:
        """Takes the keys of the next tokens, as `Keys.append`."""
        self.keys.append(k, first=first)

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on."""
        self.keys.truncate(tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.keys.reorder(rows)

    def copy(self, tokens: int | None = None) -> Selector:
        """A copy of its own, of the first ``tokens`` tokens (None: of all)."""
        other = Selector(self.settings, scale=self.scale)
        other.keys = self.keys.copy(tokens)
        return other

    def state(self) -> State:
        """What it keeps, as arrays, which `from_state` takes back."""
        return self.keys.state()

    @classmethod
    def from_state(
        cls,
        settings: Settings,
        state: Mapping[str, npt.NDArray[np.generic]],
        *,
        scale: float | None = None,
    ) -> Selector:
        """A selector with what `state` gave.

        Raises:
            ValueError: arrays are missing or do not fit to each other.
        """
        made = cls(settings, scale=scale)
        made.keys = keys_from_state(settings, state)
        return made

    def select(
        self, q: torch.Tensor, *, first: Sequence[int] | None = None, whole_groups: int
    ) -> Groups:
        """The groups to attend to, per batch row.

        Args:
            q: [batch, heads, head_dim], the (predicted) query after RoPE.
            first: per row, how many of its first tokens are padding. A group of padding is chosen
                only where a row has too few others. None: no padding.
            whole_groups: groups [0, whole_groups) are chosen among, see `Settings.whole_groups`.

        Returns:
            int64 [batch, count], ascending, count the smaller of `Settings.count` and
            ``whole_groups``. The sinks are among them.

        Raises:
            ValueError: q does not fit, or fewer tokens are known than the groups have.
        """
        self._check(whole_groups)
        if self.settings.count >= whole_groups:
            return _all_groups(len(q), whole_groups)
        begins = _begins(first, len(q))
        if self.settings.aggregation == "mean" and q.shape[1] > self.keys.kv_heads:
            # Products are linear: the mean query of a KV head has the mean of its queries' scores.
            q = q.reshape(len(q), self.keys.kv_heads, -1, q.shape[2]).mean(2)
        rows = zip(self._logits(q, begins), begins, strict=True)
        return np.stack([self._choose(logits, begin, whole_groups) for logits, begin in rows])

    def coverage(
        self,
        q: torch.Tensor,
        groups: Groups,
        *,
        first: Sequence[int] | None = None,
        whole_groups: int,
    ) -> Floats:
        """How much of what ``q`` attends to is in ``groups``. See `rescore`."""
        return self.rescore(q, groups, first=first, whole_groups=whole_groups)[0]

    def rescore(
        self,
        q: torch.Tensor,
        groups: Groups,
        *,
        first: Sequence[int] | None = None,
        whole_groups: int,
    ) -> tuple[Floats, Groups]:
        """Judges a selection by the query that it was a guess at.

        Tokens of no whole group are in memory and count as attended to.

        Args:
            q: [batch, heads, head_dim], the true query after RoPE.
            groups: int64 [batch, n], what was selected.
            first, whole_groups: as for `select`.

        Returns:
            float32 [batch], the coverage: the share of the softmax mass (by what is kept of the
            keys) that is attended to, divided by the share that a selection with ``q`` gets, of the
            head where this is least; 1 at most. And int64 [batch, count], the selection with ``q``.
        """
        self._check(whole_groups)
        covered = np.ones(len(q), np.float32)
        if self.settings.count >= whole_groups:
            return covered, _all_groups(len(q), whole_groups)
        begins = _begins(first, len(q))
        wanted = np.empty((len(q), self.settings.count), np.int64)
        for row, logits in enumerate(self._logits(q, begins)):
            wanted[row] = self._choose(logits, begins[row], whole_groups)
            attended, best = self._shares(logits, whole_groups, (groups[row], wanted[row]))
            with np.errstate(invalid="ignore", divide="ignore"):
                covered[row] = min(np.nanmin(attended / best, initial=1.0), 1.0)
        return covered, wanted

    def _logits(self, q: torch.Tensor, begins: Sequence[int]) -> Floats:
        """[batch, heads, tokens]; the first tokens of a row, its padding, have -inf."""
        logits = self.keys.scores(q)
        logits *= np.float32(q.shape[2] ** -0.5 if self.scale is None else self.scale)
        for row, begin in enumerate(begins):
            logits[row, :, :begin] = -np.inf
        return logits

    def _choose(self, logits: Floats, begin: int, whole_groups: int) -> Groups:
        size = self.settings.group_tokens
        worth = _worth(logits, size, self.settings.aggregation)[:whole_groups]
        worth = np.where(np.isnan(worth), _LOWEST, np.maximum(worth, _LOWEST)).astype(np.float32)
        padding = min(begin // size, whole_groups)
        worth[:padding] = -np.inf
        if self.settings.sinks:
            worth[padding : -(-(begin + self.settings.sinks) // size)] = np.inf
        chosen = np.empty(min(self.settings.count, whole_groups), np.int64)
        top_groups(worth, len(chosen), chosen)
        return chosen

    def _shares(
        self, logits: Floats, whole_groups: int, sets: tuple[Groups, ...]
    ) -> list[npt.NDArray[np.float64]]:
        """Per set of groups and head: the share of the softmax mass that it has."""
        size = self.settings.group_tokens
        clean = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
        with np.errstate(invalid="ignore"):
            mass = np.nan_to_num(np.exp(clean - clean.max(axis=1, keepdims=True)))
        grouped = mass[:, : whole_groups * size].reshape(len(mass), whole_groups, size).sum(axis=2)
        newest = mass[:, whole_groups * size :].sum(axis=1)
        total = mass.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return [(grouped[:, groups].sum(axis=1) + newest) / total for groups in sets]

    def _check(self, whole_groups: int) -> None:
        if whole_groups * self.settings.group_tokens > self.tokens:
            raise ValueError(
                f"{whole_groups} groups of {self.settings.group_tokens} tokens are chosen among, "
                f"but only {self.tokens} tokens are known"
            )


def _worth(logits: Floats, size: int, aggregation: str) -> Floats:
    """[heads, tokens] to one number per group, the last one of which may be unfinished."""
    tokens = logits.shape[1]
    groups = -(-tokens // size)
    if aggregation == "softmax_max":
        # The greatest of all heads is the greatest of what some of them have each.
        parts = np.array_split(logits, min(len(logits), torch.get_num_threads()))
        out = np.empty((len(parts), groups), np.float32)
        in_parts(
            lambda part: softmax_max(parts[part], size, out[part]),
            len(parts),
            logits.size * _SOFTMAX_COST,
        )
        greatest: Floats = out.max(axis=0)
        return greatest
    padded = np.full(groups * size, -np.inf, np.float32)
    with np.errstate(invalid="ignore"):
        mean = logits.mean(axis=0)
    padded[:tokens] = np.where(np.isnan(mean), -np.inf, mean)
    worth: Floats = padded.reshape(groups, size).max(axis=1)
    return worth


def _begins(first: Sequence[int] | None, batch: int) -> list[int]:
    return [0] * batch if first is None else [max(int(begin), 0) for begin in first]


def _all_groups(batch: int, whole_groups: int) -> Groups:
    return np.tile(np.arange(whole_groups, dtype=np.int64), (batch, 1))
