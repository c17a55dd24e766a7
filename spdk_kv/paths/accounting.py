"""What both paths have done so far, the last decision, and why each unit is where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from spdk_kv.memory import AvailableMemory
from spdk_kv.paths.routes import Routes
from spdk_kv.paths.units import TrackedUnit, UnitGroup
from spdk_kv.residency import Decision, Policy
from spdk_kv.units import format_nbytes

# Misses above this share of the budget call for a decision before the scan
# ends, since the rest of the scan would go on evicting. Chosen well above the 1 % of misses that
# the adaptive policy puts down to chance.
_ALARM_SHARE = 0.05


class Accounting:
    """Counters, and how they are shown. One thread at a time.

    ``single_path_reason``: why there is only one path; empty where there are two.
    """

    def __init__(self, policy: Policy, routes: Routes, single_path_reason: str) -> None:
        self._policy = policy
        self._routes = routes
        self._single_path_reason = single_path_reason
        self._available = AvailableMemory(0, "", None, ())
        self._budget_nbytes = 0
        self._reason = single_path_reason or "nothing was decided yet"
        # Bytes read through the page cache since the last decision.
        self._recent_hit_nbytes = 0
        self._recent_missed_nbytes = 0
        self._counters = {
            "decisions": 0,
            "promotions": 0,
            "demotions": 0,
            "cached_read_nbytes": 0,
            "direct_read_nbytes": 0,
            "filled_nbytes": 0,
            "missed_nbytes": 0,
            "taken_over_nbytes": 0,
        }

    def count_direct(self, nbytes: int) -> None:
        """A direct read has finished."""
        self._counters["direct_read_nbytes"] += nbytes

    def count_cached(self, nbytes: int, cold_nbytes: int, missed_nbytes: int) -> None:
        """A read through the page cache has finished. ``cold_nbytes``: what it did not find there;
        ``missed_nbytes``: the part of that which had been evicted."""
        self._counters["cached_read_nbytes"] += nbytes
        self._counters["filled_nbytes"] += cold_nbytes - missed_nbytes
        self._counters["missed_nbytes"] += missed_nbytes
        self._recent_hit_nbytes += nbytes - cold_nbytes
        self._recent_missed_nbytes += missed_nbytes

    def count_takeover(self, nbytes: int) -> None:
        """One path could not deliver ``nbytes``, and the other one did."""
        self._counters["taken_over_nbytes"] += nbytes

    def count_demotion(self) -> None:
        self._counters["demotions"] += 1

    def count_promotion(self) -> None:
        self._counters["promotions"] += 1

    @property
    def has_recent_misses(self) -> bool:
        return self._recent_missed_nbytes > 0

    @property
    def is_alarming(self) -> bool:
        """So much was missed since the last decision that the next one must not wait."""
        return self._recent_missed_nbytes > _ALARM_SHARE * self._budget_nbytes

    def take_recent(self) -> tuple[int, int]:
        """(hit, missed) bytes of reads through the page cache since this was called last."""
        recent = self._recent_hit_nbytes, self._recent_missed_nbytes
        self._recent_hit_nbytes = self._recent_missed_nbytes = 0
        return recent

    def record_decision(self, decision: Decision, available: AvailableMemory) -> bool:
        """Returns whether its numbers differ from those of the last one."""
        before = self._budget_nbytes, self._available.limited_by
        self._counters["decisions"] += 1
        self._budget_nbytes, self._reason = decision.budget_nbytes, decision.reason
        self._available = available
        return before != (decision.budget_nbytes, available.limited_by)

    def stats(self, groups: Iterable[UnitGroup]) -> dict[str, Any]:
        """Policy, memory, the last decision, and bytes by path since the opening."""
        units = [unit for group in groups for unit in group.units]
        cached = [unit for unit in units if unit.cached]
        copy = self._routes.copy
        return {
            "policy": self._policy.name,
            "paths": len(self._routes.engines),
            **(copy.stats(cached) if copy else {"page_cache_dir": None}),
            "reason": self._reason,
            "available_nbytes": self._available.nbytes,
            "limited_by": self._available.limited_by,
            "budget_nbytes": self._budget_nbytes,
            "units": len(units),
            "units_nbytes": sum(unit.nbytes for unit in units),
            "cached_units": len(cached),
            "cached_nbytes": sum(unit.nbytes for unit in cached),
            **self._counters,
        }

    def why(
        self, groups: Iterable[UnitGroup], is_asleep: Callable[[UnitGroup], bool]
    ) -> list[dict[str, Any]]:
        """An entry per unit: sequence, layer, K or V, bytes, its path, and the reason for that."""
        direct, copy = self._routes.direct.name, self._routes.copy
        return [
            {
                "sequence": group.name,
                "layer": unit.layer,
                "part": "v" if unit.value else "k",
                "nbytes": unit.nbytes,
                "path": "page cache" if unit.cached and unit.filled else direct,
                "why": (
                    self._single_path_reason
                    or (_why_asleep(unit) if is_asleep(group) else None)
                    or self._policy.why(unit.for_policy())
                )
                + (copy.shortfall(unit) if copy else ""),
            }
            for group in groups
            for unit in group.units
        ]

    def line(self) -> str:
        """One line on what was read by which path."""
        counters = self._counters
        return (
            f"{format_nbytes(counters['cached_read_nbytes'])} read through the page cache "
            f"({format_nbytes(counters['missed_nbytes'])} of it missed), "
            f"{format_nbytes(counters['direct_read_nbytes'])} directly"
        )


def _why_asleep(unit: TrackedUnit) -> str:
    if unit.cached:
        return "page cache: its sequence is not in use, and stays until others need the room"
    return "direct: its sequence is not in use"
