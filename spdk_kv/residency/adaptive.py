"""The default policy: as many units in the page cache as the kernel is seen to keep there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from spdk_kv.residency.budget import Budget
from spdk_kv.residency.evidence import Evidence
from spdk_kv.residency.order import prefix, priority
from spdk_kv.residency.types import Decision, Observation, Unit, check_keys
from spdk_kv.units import format_nbytes

# A page (4 KiB) is dropped and read again when a row is appended to it.
_PAGE_NBYTES = 4096


class Adaptive:
    """The budget follows the available memory with hysteresis and a learnt margin; units fill it in
    a fixed order.

    Args:
        max_budget_nbytes: the budget never exceeds it, however much memory is available.
    """

    name = "adaptive"

    def __init__(self, max_budget_nbytes: int | None = None) -> None:
        self._max_nbytes = max_budget_nbytes
        self._budget = Budget()
        self._sizes: dict[Hashable, int] = {}  # of the kept units, at the last decision
        self._ranks: dict[Hashable, int] = {}
        self._cached: frozenset[Hashable] = frozenset()

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        if self._max_nbytes is not None and seen.available_nbytes > self._max_nbytes:
            seen = replace(seen, available_nbytes=self._max_nbytes)
        kept = {unit.key: unit.nbytes for unit in units if unit.key in cached}
        change = self._budget.update(Evidence.of(seen, sum(kept.values()), self._grown(kept)))
        order = priority(units)
        budget = self._budget.nbytes
        chosen = prefix(order, cached, budget)
        self._cached = frozenset(unit.key for unit in chosen)
        self._sizes = {unit.key: unit.nbytes for unit in chosen}
        self._ranks = {unit.key: rank for rank, unit in enumerate(order, 1)}
        reason = (
            f"the budget is {format_nbytes(budget)}, {change}; it holds {len(chosen)} of "
            f"{len(units)} units, {format_nbytes(sum(self._sizes.values()))}"
        )
        return Decision(self._cached, budget, reason)

    def why(self, unit: Unit) -> str:
        rank = self._ranks.get(unit.key)
        if rank is None:
            return "direct: it was not there at the last decision"
        budget = f"the budget of {format_nbytes(self._budget.nbytes)}"
        place = f"number {rank} of {len(self._ranks)} by use, weight and place in the scan"
        if unit.key in self._cached:
            return f"page cache: {place}, of which {len(self._cached)} fit into {budget}"
        if unit.planned_nbytes > self._budget.nbytes:
            return f"direct: its {format_nbytes(unit.planned_nbytes)} exceed {budget}"
        return f"direct: {place}, of which only {len(self._cached)} fit into {budget}"

    def _grown(self, kept: dict[Hashable, int]) -> int:
        """Bytes of the kept units that were written since the last decision: their first read
        finds them missing, and no eviction is to blame."""
        grown = 0
        for key, nbytes in kept.items():
            more = nbytes - self._sizes.get(key, nbytes)
            if more > 0:
                grown += more + _PAGE_NBYTES
        return grown
