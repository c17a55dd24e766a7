"""What is to be run, in which order: the settings, and the schedule of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rows import VARIANTS

from spdk_kv.measure import Load

T = TypeVar("T")

RHOS = (0.22, 0.33, 0.44, 0.55, 0.66, 0.77, 0.9, 1.2)


@dataclass(frozen=True)
class Plan:
    """``parts``: what is measured, see run.py. ``rhos``: budgets as shares of the KV cache.
    ``link``: times the drive's best, or None. ``fio_s``: seconds of each fio
    job; ``fio_nbytes``: its file."""

    load: Load
    parts: tuple[str, ...] = ("budgets",)
    variants: tuple[str, ...] = VARIANTS
    rhos: tuple[float, ...] = RHOS
    runs: int = 5
    compute_s: float = 0.0
    link: float | None = None
    fio_s: float = 3.0
    fio_nbytes: int = 1 << 30


def interleaved(plan: Plan, number: int) -> Iterator[tuple[float, str]]:
    """The cases of run ``number``: every budget, every variant."""
    yield from turn([(rho, variant) for rho in plan.rhos for variant in plan.variants], number)


def turn(cases: Sequence[T], number: int) -> Sequence[T]:
    """The order of run ``number``: every other one goes backwards, so that what slows the machine
    for a while slows all of them alike."""
    return cases if number % 2 == 0 else cases[::-1]
