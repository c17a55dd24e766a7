"""The default policy: as many units in the page cache as the kernel is seen to keep there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from spdk_kv.residency.limit import Evidence, Limit
from spdk_kv.residency.order import prefix, priority
from spdk_kv.residency.types import Decision, Observation, Unit, check_keys
from spdk_kv.units import format_nbytes

# A page is dropped and read again when a row is appended to it.
_PAGE_NBYTES = 4096


class Adaptive:
    """X follows the budget with hysteresis and a learnt margin; units in a fixed order fill it.

    ``limit_nbytes``: X never exceeds it, whatever the budget is.
    """

    name = "adaptive"

    def __init__(self, limit_nbytes: int | None = None) -> None:
        self._most = limit_nbytes
        self._limit = Limit()
        self._sizes: dict[Hashable, int] = {}  # of the kept units, at the last decision
        self._ranks: dict[Hashable, int] = {}
        self._cached: frozenset[Hashable] = frozenset()

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        if self._most is not None and seen.budget_nbytes > self._most:
            seen = replace(seen, budget_nbytes=self._most)
        kept = {unit.key: unit.nbytes for unit in units if unit.key in cached}
        moved = self._limit.update(Evidence.of(seen, sum(kept.values()), self._grown(kept)))
        order = priority(units)
        limit = self._limit.nbytes
        chosen = prefix(order, cached, limit)
        self._cached = frozenset(unit.key for unit in chosen)
        self._sizes = {unit.key: unit.nbytes for unit in chosen}
        self._ranks = {unit.key: rank for rank, unit in enumerate(order, 1)}
        reason = (
            f"X is {format_nbytes(limit)} and {moved}; it holds {len(chosen)} of {len(units)} "
            f"units, {format_nbytes(sum(self._sizes.values()))}"
        )
        return Decision(self._cached, limit, reason)

    def why(self, unit: Unit) -> str:
        rank = self._ranks.get(unit.key)
        if rank is None:
            return "direct: it was not there at the last decision"
        limit = format_nbytes(self._limit.nbytes)
        place = f"number {rank} of {len(self._ranks)} by use, weight and place in the scan"
        if unit.key in self._cached:
            return f"page cache: {place}, of which {len(self._cached)} fit into X, {limit}"
        if unit.planned_nbytes > self._limit.nbytes:
            size = format_nbytes(unit.planned_nbytes)
            return f"direct: its {size} are more than X, {limit}"
        return f"direct: {place}, of which only {len(self._cached)} fit into X, {limit}"

    def _grown(self, kept: dict[Hashable, int]) -> int:
        """Bytes of the kept units that were written since the last decision: their first read
        finds them missing, and no eviction is to blame."""
        grown = 0
        for key, nbytes in kept.items():
            more = nbytes - self._sizes.get(key, nbytes)
            if more > 0:
                grown += more + _PAGE_NBYTES
        return grown
