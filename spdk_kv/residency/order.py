"""The order in which units deserve the page cache; every prefix is spread evenly over the scan.

A fixed order makes changes cheap: a larger or smaller budget moves only the difference. Spreading
keeps both paths busy at once: if the first layers were cached and the last ones were not, one path
would idle while the other works.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache

from spdk_kv.residency.types import Unit

# Chosen: a sequence that scans alternately with a few others is not idle.
_AWAKE_STEPS = 4


def priority(units: Sequence[Unit]) -> list[Unit]:
    """``units``, given in the order of a scan, in the order in which they deserve the page cache.

    Sequences in use before idle ones, heavier units before lighter ones, and among equals each
    sequence's units in the order of `spread` over its scan, the sequences alternating.
    """
    ranks = _spread_ranks(units)
    places = range(len(units))
    order = sorted(
        places, key=lambda i: (_idleness(units[i].idle_steps), -units[i].weight, ranks[i], i)
    )
    return [units[place] for place in order]


def prefix(order: Iterable[Unit], cached: frozenset[Hashable], budget: int) -> list[Unit]:
    """The longest prefix of ``order`` that fits ``budget`` bytes, with hysteresis.

    A unit that is larger than the budget is passed over. One that is not in ``cached`` joins only
    where a little room is left above it, so that small changes of the budget move nothing.
    """
    chosen: list[Unit] = []
    total = 0
    for unit in order:
        if unit.planned_nbytes > budget:
            continue
        total += unit.planned_nbytes
        if total > (budget if unit.key in cached else budget - budget // 256):
            break
        chosen.append(unit)
    return chosen


@lru_cache(maxsize=256)
def spread(count: int) -> tuple[int, ...]:
    """The places 0 to ``count`` - 1 in an order of which every prefix is spread evenly.

    Every second place before the others, and so within each half; bit reversal where ``count`` is
    a power of two. The first half of the units of a model is then one of each layer.
    """
    if count < 2:
        return tuple(range(count))
    even, odd = spread((count + 1) // 2), spread(count // 2)
    return (*(2 * place for place in even), *(2 * place + 1 for place in odd))


def _spread_ranks(units: Sequence[Unit]) -> list[int]:
    """For each unit its rank within its sequence's own order, so that a sequence that comes or
    goes does not reshuffle the others."""
    places: dict[Hashable, list[int]] = {}
    for place, unit in enumerate(units):
        places.setdefault(unit.sequence, []).append(place)
    ranks = [0] * len(units)
    for scan in places.values():
        for rank, index in enumerate(spread(len(scan))):
            ranks[scan[index]] = rank
    return ranks


def _idleness(steps: int) -> int:
    # Doubling classes: the longer a sequence is idle, the more rarely its units change places.
    return 0 if steps < _AWAKE_STEPS else steps.bit_length()
