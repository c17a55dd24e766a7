"""How much may still be written to a drive that wears, and what is worth it."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

from spdk_kv.units import format_nbytes, parse_nbytes

_PERIODS = {"minute": 60.0, "hour": 3600.0, "day": 86400.0, "week": 604800.0, "year": 31536000.0}
_RATE = re.compile(r"\s*(.+?)\s*/\s*([A-Za-z]+)\s*")
# What may be written at once after a pause. The rest of the budget comes evenly, so that no period,
# whenever it begins, has more than the budget.
_BURST_SHARE = 1 / 8
# With less left than this share of a burst, only what was asked for before is written.
_PLENTY_SHARE = 1 / 2
# Keys that were declined, remembered in two halves of which the older one is forgotten.
_MOST_REMEMBERED = 100_000


@dataclass(frozen=True)
class WriteBudget:
    """At most ``nbytes`` in any ``period_s`` seconds."""

    nbytes: int
    period_s: float
    period: str

    @classmethod
    def parse(cls, text: str) -> WriteBudget:
        """Of text like ``"200 GiB/day"``: a size, and minute, hour, day, week or year.

        ValueError.
        """
        match = _RATE.fullmatch(text) if isinstance(text, str) else None
        period = match[2].lower() if match else ""
        if match is None or period not in _PERIODS:
            raise ValueError(
                f"a write budget is a size per {', '.join(_PERIODS)}, like '200 GiB/day', not "
                f"{text!r}"
            )
        nbytes = parse_nbytes(match[1])
        if nbytes <= 0:
            raise ValueError(f"a write budget of {text!r} allows nothing")
        return cls(nbytes, _PERIODS[period], period)

    @property
    def burst_nbytes(self) -> float:
        """The most that is left after a pause."""
        return self.nbytes * _BURST_SHARE

    @property
    def nbytes_per_s(self) -> float:
        """What comes back."""
        return self.nbytes * (1 - _BURST_SHARE) / self.period_s

    def __str__(self) -> str:
        return f"{format_nbytes(self.nbytes)}/{self.period}"


class Admission:
    """Decides by a budget what is written. Not thread-safe; reads no clock.

    Everything is written while there is plenty left. When it runs low, what nobody has asked to
    write before is declined: most prompts come once, and those that come again are worth a write.
    When nothing is left, nothing is written.

    Args:
        budget: What may be written.
        left_nbytes: What was left at ``now_s``; by default all of a burst.
        now_s: Seconds on a clock that goes on while no process runs.
        written_nbytes: The drive's count at that time.
    """

    def __init__(
        self,
        budget: WriteBudget,
        *,
        now_s: float,
        left_nbytes: float | None = None,
        written_nbytes: int = 0,
    ) -> None:
        self.budget = budget
        self.declined = 0
        """How many writes were not admitted."""
        self._left = budget.burst_nbytes
        if left_nbytes is not None:
            self._left = min(self._left, left_nbytes)
        self._now_s = now_s
        self._written_nbytes = written_nbytes
        self._asked: set[Hashable] = set()
        self._asked_before: set[Hashable] = set()

    @property
    def left_nbytes(self) -> float:
        """What may be written just now; below 0 after a write that was larger."""
        return self._left

    def update(self, now_s: float, written_nbytes: int) -> None:
        """It is ``now_s``, and ``written_nbytes`` have been written in all."""
        # A clock that was set back gives nothing, and takes nothing.
        earned = max(0.0, now_s - self._now_s) * self.budget.nbytes_per_s
        self._left = min(self.budget.burst_nbytes, self._left + earned)
        self._left -= written_nbytes - self._written_nbytes
        self._now_s, self._written_nbytes = now_s, written_nbytes

    def admits(self, key: Hashable, nbytes: int, promised_nbytes: int = 0) -> bool:
        """Whether to write ``nbytes`` under ``key``, where ``promised_nbytes`` were admitted since
        the last :meth:`update`. Remembers a key that is declined."""
        left = self._left - promised_nbytes
        if left >= max(nbytes, _PLENTY_SHARE * self.budget.burst_nbytes):
            return True
        if left > 0 and (key in self._asked or key in self._asked_before):
            self._asked.discard(key)
            self._asked_before.discard(key)
            return True
        self.declined += 1
        self._remember(key)
        return False

    def _remember(self, key: Hashable) -> None:
        if len(self._asked) >= _MOST_REMEMBERED // 2:
            self._asked_before, self._asked = self._asked, set()
        self._asked.add(key)
