"""Which units the page cache holds, and which are read directly: policies, pure and exchangeable.

A policy is told between the steps what the page cache may hold and what was seen, and answers
with the set of units for the page-cache path. It does no I/O and looks at no clock.
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
    """Every unit is read directly, whatever the budget."""

    name = "direct"

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        return Decision(frozenset(), 0, "residency is 'direct': the page cache is not used")

    def why(self, unit: Unit) -> str:
        return "direct: residency is 'direct'"


class AllPageCache:
    """Every unit is read through the page cache, whatever the budget; it may thrash."""

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
            f"cache, which may hold {format_nbytes(seen.budget_nbytes)}",
        )

    def why(self, unit: Unit) -> str:
        return "page cache: residency is 'pagecache'"


class PaperPolicy:
    """DUAL-BLADE's (arXiv 2604.26557): a unit is bound for good when it first appears.

    In the order of layers, K then V, units go to the page cache while their final sizes sum up to
    at most X; all others are direct. X is ``limit_nbytes``, or else the budget at the first
    decision about any unit, and then stays. A unit that is deleted gives its bytes back.
    """

    name = "paper"

    def __init__(self, limit_nbytes: int | None = None) -> None:
        self._limit = limit_nbytes
        self._given = limit_nbytes is not None
        self._bound: dict[Hashable, int] = {}  # final sizes on the page-cache path, 0: direct
        self._cached: frozenset[Hashable] = frozenset()

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        check_keys(units)
        if not units:
            self._bound, self._cached = {}, frozenset()
            return Decision(self._cached, self._limit or 0, "there are no units yet")
        if self._limit is None:
            self._limit = seen.budget_nbytes
        there = {unit.key for unit in units}
        self._bound = {key: size for key, size in self._bound.items() if key in there}
        total = sum(self._bound.values())
        for unit in units:
            if unit.key not in self._bound:
                size = max(unit.nbytes, unit.capacity_nbytes)
                fits = 0 < size <= self._limit - total
                self._bound[unit.key] = size if fits else 0
                total += self._bound[unit.key]
        self._cached = frozenset(key for key, size in self._bound.items() if size)
        source = "given" if self._given else "the budget at the first decision"
        reason = (
            f"X is {format_nbytes(self._limit)}, {source}, and does not move; it holds "
            f"{len(self._cached)} of {len(units)} units, {format_nbytes(total)} when they are full"
        )
        return Decision(self._cached, self._limit, reason)

    def why(self, unit: Unit) -> str:
        if unit.key not in self._bound:
            return "direct: it was not there at the last decision"
        limit = format_nbytes(self._limit or 0)
        if unit.key in self._cached:
            return f"page cache: when it appeared, its final size still fitted into X, {limit}"
        return f"direct: when it appeared, its final size did not fit into X, {limit}, any more"


_POLICIES: dict[str, Callable[[int | None], Policy]] = {
    "adaptive": Adaptive,
    "paper": PaperPolicy,
    "direct": lambda limit: AllDirect(),
    "pagecache": lambda limit: AllPageCache(),
}


def make_policy(name: str, limit: int | None = None) -> Policy:
    """A new policy: "adaptive", "paper", "direct" or "pagecache".

    ``limit``: bytes that the page cache may hold at most, None for what the budget says; the last
    two have no use for it. Raises ValueError for an unknown name or a negative limit.
    """
    if name not in _POLICIES:
        raise ValueError(f"no residency policy {name!r}; there are {', '.join(_POLICIES)}")
    if limit is not None and limit < 0:
        raise ValueError(f"the limit of a residency policy is not negative: {limit}")
    return _POLICIES[name](limit)
