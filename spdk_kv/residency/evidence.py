"""What the last step showed about the page cache, in the numbers that the budget is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from spdk_kv.residency.types import Observation

# Misses above this share of what was read mean that the kernel evicts. Chosen: below it, pages
# that others displaced by chance explain them.
_MAX_CHANCE_MISSES = 0.01


@dataclass(frozen=True)
class Evidence:
    """As Observation, in bytes; ``kept``: bytes on the page-cache path in the last step. ``kept``
    and ``missed`` leave out what was only just written."""

    available: int
    kept: int
    hit: int
    missed: int
    resident: int | None
    pressure: float

    @classmethod
    def of(cls, seen: Observation, kept: int, grown: int) -> Evidence:
        """``grown``: bytes of the kept units that no read could have brought in yet."""
        return cls(
            seen.available_nbytes,
            max(0, kept - grown),
            seen.hit_nbytes,
            max(0, seen.missed_nbytes - grown),
            seen.resident_nbytes,
            seen.pressure,
        )

    @property
    def read(self) -> int:
        """Bytes read that were hits or misses."""
        return self.hit + self.missed

    @property
    def is_silent(self) -> bool:
        """Nothing was read that could have been missed."""
        return not self.kept or not self.read

    @property
    def shows_eviction(self) -> bool:
        """More was missed than chance explains."""
        return not self.is_silent and self.missed > _MAX_CHANCE_MISSES * self.read

    @property
    def hit_ratio(self) -> float:
        return self.hit / self.read if self.read else 0.0
