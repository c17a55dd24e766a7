"""The policies by name: which units the page cache holds, and which are read directly.

Between the steps a policy is given the available memory and what was seen, and returns the set of
units for the page-cache path. It does no I/O and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from spdk_kv.residency.adaptive import Adaptive
from spdk_kv.residency.types import Decision, Observation, Policy, Unit, check_keys
from spdk_kv.units import format_nbytes

__all__ = [
    "Adaptive",
    "AllDirect",
    "AllPageCache",
    "Decision",
    "Observation",
    "PaperPolicy",
    "Policy",
    "Unit",
    "make_policy",
]


class AllDirect:
    """Every unit is read directly."""

    name = "direct"

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        return Decision(frozenset(), 0, "residency is 'direct': the page cache is not used")

    def why(self, unit: Unit) -> str:
        return "direct: residency is 'direct'"


class AllPageCache:
    """Every unit is read through the page cache, which may thrash."""

    name = "pagecache"

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        nbytes = sum(unit.nbytes for unit in units)
        return Decision(
            frozenset(unit.key for unit in units),
            nbytes,
            f"residency is 'pagecache': all {format_nbytes(nbytes)} are read through the page "
            f"cache, with {format_nbytes(seen.available_nbytes)} of memory available",
        )

    def why(self, unit: Unit) -> str:
        return "page cache: residency is 'pagecache'"


class PaperPolicy:
    """DUAL-BLADE's (arXiv 2604.26557): a unit is bound for good when it first appears.

    In the order of layers, K then V, units go to the page cache while their final sizes sum up to
    at most the budget ("X" in the paper); all others are direct. A unit that is deleted gives its
    bytes back.

    Args:
        budget_nbytes: the budget; None for the memory available at the first decision about any
            unit. Never changes after that.
    """

    name = "paper"
    binds_for_good = True
    """What it is not shown any more it takes for deleted."""

    def __init__(self, budget_nbytes: int | None = None) -> None:
        self._budget = budget_nbytes
        self._given = budget_nbytes is not None
        self._bound: dict[Hashable, int] = {}  # final sizes on the page-cache path, 0: direct
        self._cached: frozenset[Hashable] = frozenset()

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        if not units:
            self._bound, self._cached = {}, frozenset()
            return Decision(self._cached, self._budget or 0, "there are no units yet")
        if self._budget is None:
            self._budget = seen.available_nbytes
        there = {unit.key for unit in units}
        self._bound = {key: size for key, size in self._bound.items() if key in there}
        total = sum(self._bound.values())
        for unit in units:
            if unit.key not in self._bound:
                size = max(unit.nbytes, unit.capacity_nbytes)
                fits = 0 < size <= self._budget - total
                self._bound[unit.key] = size if fits else 0
                total += self._bound[unit.key]
        self._cached = frozenset(key for key, size in self._bound.items() if size)
        source = "given" if self._given else "the memory available at the first decision"
        reason = (
            f"the budget is {format_nbytes(self._budget)}, {source}, and never changes; it holds "
            f"{len(self._cached)} of {len(units)} units, {format_nbytes(total)} when they are full"
        )
        return Decision(self._cached, self._budget, reason)

    def why(self, unit: Unit) -> str:
        if unit.key not in self._bound:
            return "direct: it was not there at the last decision"
        budget = f"the budget of {format_nbytes(self._budget or 0)}"
        if unit.key in self._cached:
            return f"page cache: when it appeared, its final size still fitted into {budget}"
        return f"direct: when it appeared, its final size no longer fitted into {budget}"


_POLICIES: dict[str, Callable[[int | None], Policy]] = {
    "adaptive": Adaptive,
    "paper": PaperPolicy,
    "direct": lambda _: AllDirect(),
    "pagecache": lambda _: AllPageCache(),
}


def make_policy(name: str, budget_nbytes: int | None = None) -> Policy:
    """A new policy.

    Args:
        name: "adaptive", "paper", "direct" or "pagecache".
        budget_nbytes: the largest budget of "adaptive", and the budget of "paper"; None to derive
            it from the available memory. The other two do not use it.

    Raises:
        ValueError: for an unknown name or a negative budget.
    """
    if name not in _POLICIES:
        raise ValueError(f"no residency policy {name!r}; there are {', '.join(_POLICIES)}")
    if budget_nbytes is not None and budget_nbytes < 0:
        raise ValueError(f"the budget of a residency policy is not negative: {budget_nbytes}")
    return _POLICIES[name](budget_nbytes)
