"""Which settings to take, and why, in words."""

from __future__ import annotations

from dataclasses import dataclass

from spdk_kv.errors import CapacityError
from spdk_kv.sparse.settings import Settings
from spdk_kv.sparse.tuning.costs import Cost, Decoding, Machine, cost, holds_everything, whole_cost
from spdk_kv.sparse.tuning.frontier import AS_FAST, Goal, best, priced, settings_for
from spdk_kv.sparse.tuning.reuse import MISS_RATES, miss_rate
from spdk_kv.units import format_nbytes

PROVEN_SHARE = 0.075
"""At this share the worst task that was tried lost at most 2 points to dense attention."""

_SMALLER = 0.9  # step by which the share is lowered until it fits


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        settings: for ``SparseKVCache(settings=...)``.
        cost: of a step with them.
        share: of the tokens, which is less than what was asked for where memory is short.
        why: one sentence per decision.
    """

    settings: Settings
    cost: Cost
    share: float
    why: tuple[str, ...]


def choose(goal: Goal, machine: Machine, decoding: Decoding) -> Choice:
    """The best settings for ``goal``, or for the largest share that memory has room for.

    Raises:
        CapacityError: memory has no room even for one group and what groups are scored by.
    """
    share = goal.share
    while (found := best(Goal(share, goal.memory_nbytes), machine, decoding)) is None:
        if share * decoding.tokens < 1:
            raise _no_room(goal, decoding, machine)
        share *= _SMALLER
    settings, price = found
    reasons = [
        _of_tokens(goal, share, settings, decoding),
        _of_groups(share, settings, price, goal, machine, decoding),
        _of_pool(share, settings, price, goal, machine, decoding),
        f"The newest {settings.recent} tokens stay in memory: a group is read only once it is "
        "whole and older than these.",
        _of_bound(price, machine, decoding),
    ]
    everything = decoding.layers * decoding.batch * decoding.tokens * decoding.token_nbytes
    if everything <= goal.memory_nbytes:
        reasons.append(
            f"K and V of all tokens take {format_nbytes(everything)}, which fits into memory: "
            "there they would not have to be read at all."
        )
    return Choice(settings, price, share, tuple(reasons))


def _no_room(goal: Goal, decoding: Decoding, machine: Machine) -> CapacityError:
    group = min(machine.reads)
    least = cost(settings_for(0.0, group, 1.0, decoding.tokens), machine, decoding)
    return CapacityError(
        f"{decoding.tokens:,} tokens take {format_nbytes(least.memory_nbytes)} of memory to be "
        f"scored by, with one group of each layer; there are {format_nbytes(goal.memory_nbytes)}: "
        "allow more memory, or fewer tokens or rows"
    )


def _of_tokens(goal: Goal, share: float, settings: Settings, decoding: Decoding) -> str:
    said = f"{settings.tokens:,} tokens of {decoding.tokens:,} are attended to"
    if share < goal.share:
        return (
            f"{said}, {_percent(share)} instead of {_percent(goal.share)}: more do not fit into "
            f"{format_nbytes(goal.memory_nbytes)} of memory. Answers may be worse for it."
        )
    extra = ""
    if settings.group_tokens > 4:
        extra = f" ({_percent(share)} in groups of 4, more in larger ones for equal answers)"
    if share == PROVEN_SHARE:
        return (
            f"{said}{extra or f', {_percent(share)}'}: at that share the worst task tried lost at "
            "most 2 points."
        )
    side = "above" if share > PROVEN_SHARE else "below"
    return (
        f"{said}{extra or f', {_percent(share)}'}, as asked for; that is {side} the "
        f"{_percent(PROVEN_SHARE)} at which the worst task tried lost at most 2 points."
    )


def _of_groups(
    share: float,
    settings: Settings,
    price: Cost,
    goal: Goal,
    machine: Machine,
    decoding: Decoding,
) -> str:
    chosen = settings.group_tokens
    rates: dict[int, float] = {}
    for each, found in priced(share, machine, decoding):
        if found.memory_nbytes <= goal.memory_nbytes:
            best_yet = rates.get(each.group_tokens, 0.0)
            rates[each.group_tokens] = max(best_yet, found.tokens_per_s)
    others = [f"of {size} {rate:.3g}" for size, rate in sorted(rates.items()) if size != chosen]
    more = "larger ones bring more tokens that nobody asked for"
    kib = f"{chosen * decoding.token_nbytes / 1024:,.0f} KiB"
    said = f"Groups of {chosen} tokens ({kib}) give {price.tokens_per_s:.3g} tokens/s"
    if not others:
        return f"{said}; of no other size do they fit into memory."
    if max(rates.values()) <= AS_FAST * min(rates.values()):
        return f"{said}, and so do all other sizes, about; {more}."
    return (
        f"{said}, those {', '.join(others)}: of what is about as fast the smallest are taken, "
        f"since {more}."
    )


def _of_pool(
    share: float,
    settings: Settings,
    price: Cost,
    goal: Goal,
    machine: Machine,
    decoding: Decoding,
) -> str:
    said = f"A pool of {settings.pool:g} times the selection"
    if holds_everything(settings, decoding):
        return f"{said} holds the whole context, so that nothing is read twice."
    missing = f"{_percent(miss_rate(settings.pool))} of a selection is read, not in memory"
    takes = f"all takes {format_nbytes(price.memory_nbytes)} of {format_nbytes(goal.memory_nbytes)}"
    largest = max(MISS_RATES)
    if settings.pool >= largest:
        return f"{said}, the largest that was measured: {missing}; {takes}."
    larger = settings_for(share, settings.group_tokens, largest, decoding.tokens)
    other = cost(larger, machine, decoding)
    faster = other.tokens_per_s > AS_FAST * price.tokens_per_s
    if faster and other.memory_nbytes > goal.memory_nbytes:
        return (
            f"{said}: {missing}; {takes}. {largest:g} times would give {other.tokens_per_s:.3g} "
            f"tokens/s, but take {format_nbytes(other.memory_nbytes)}."
        )
    return f"{said}: {missing}; {takes}. A larger one would not be noticeably faster."


def _of_bound(price: Cost, machine: Machine, decoding: Decoding) -> str:
    whole = whole_cost(machine, decoding)
    reading, computing, scoring = (
        f"{1e3 * each:.3g} ms" for each in (price.read_s, price.compute_s, price.score_s)
    )
    said = {
        "reading": f"Reading takes longest ({reading} per step, computing {computing}, scoring "
        f"{scoring}), so a faster drive would help",
        "computing": f"Computing takes longest ({computing} per step, scoring {scoring}) and hides "
        f"the reads ({reading}), so a faster drive would not help",
        "scoring": f"Scoring takes longest ({scoring} per step, computing {computing}, reading "
        f"{reading}), so a shorter context or a faster processor would help",
    }[price.bound]
    return f"{said}. Reading all tokens would give {whole.tokens_per_s:.3g} tokens/s here."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
