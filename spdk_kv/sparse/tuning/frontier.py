"""The fastest way to read each share of the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from spdk_kv.sparse.settings import Settings, preset
from spdk_kv.sparse.tuning.costs import Cost, Decoding, Machine, cost, holds_everything

SHARES = (0.01, 0.02, 0.04, 0.075, 0.15, 0.3)
"""Shares of the tokens that are compared."""

POOLS = (1.0, 1.5, 2.0, 3.0, 4.0)
_LEAST_GROUP = 4
_RECENT = Settings.recent
# What is this close to the fastest is as fast: reads vary more than that from run to run.
AS_FAST = 1.03
# Reads that take at most this much of the time that hides them stay hidden where the drive is busy
# with others, or the time of computing was overestimated.
_SPARE = 0.5

Priced = tuple[Settings, Cost]


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        share: of the tokens of the context, attended to in groups of 4.
        memory_nbytes: what resident groups, newest tokens and what they are scored by may take.
    """

    share: float
    memory_nbytes: int


def settings_for(share: float, group_tokens: int, pool: float, tokens: int) -> Settings:
    """Settings that attend to ``share`` of ``tokens``, and to more in larger groups.

    Larger groups bring more tokens that nobody asked for. On a real model 256 tokens in groups of
    16 answered as much as 128 in groups of 4 (89.1 % of the digits), hence the square root.
    """
    wanted = share * tokens * math.sqrt(group_tokens / _LEAST_GROUP)
    count = max(1, min(math.ceil(wanted / group_tokens), tokens // group_tokens))
    return preset(
        "codes",
        tokens=count * group_tokens,
        group_tokens=group_tokens,
        pool=pool,
        recent=max(_RECENT, group_tokens),
    )


def priced(
    share: float, machine: Machine, decoding: Decoding, pools: Iterable[float] = POOLS
) -> Iterator[Priced]:
    """All ways to read ``share``, with what they cost; those that hold the whole context in memory
    only where every one does."""
    ways = [
        settings_for(share, group_tokens, pool, decoding.tokens)
        for group_tokens in sorted(machine.reads)
        for pool in pools
    ]
    reading = [settings for settings in ways if not holds_everything(settings, decoding)]
    for settings in reading or ways:
        yield settings, cost(settings, machine, decoding)


def best(goal: Goal, machine: Machine, decoding: Decoding) -> Priced | None:
    """The fastest one that fits into memory. Of those that are about as fast the one with the
    smallest groups, since these are proven best; of these the one that reads the shortest, or the
    one with the least memory of those whose reads have time to spare. None where none fits."""
    fitting = [
        each
        for each in priced(goal.share, machine, decoding)
        if each[1].memory_nbytes <= goal.memory_nbytes
    ]
    if not fitting:
        return None
    limit_s = min(found.step_s for _, found in fitting) * AS_FAST
    fast = [each for each in fitting if each[1].step_s <= limit_s]

    def rank(each: Priced) -> tuple[int, float, int]:
        settings, found = each
        read_s = max(found.read_s, _SPARE * found.compute_s)
        return settings.group_tokens, read_s, found.memory_nbytes

    return min(fast, key=rank)


def best_of_shares(
    shares: Sequence[float], memory_nbytes: int, machine: Machine, decoding: Decoding
) -> list[tuple[float, Priced | None]]:
    """The best way to read each of ``shares``."""
    return [
        (share, best(Goal(share, memory_nbytes), machine, decoding)) for share in sorted(shares)
    ]
