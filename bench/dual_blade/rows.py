"""From samples to rows: one row per budget and variant, medians and quartiles over the runs.

A sample is a JSON object with a ``kind``: ``about`` (the load, the machine), ``fio`` (the drive),
``copy`` (the memory), ``probe`` (a variant's own memory), ``case`` (one run), ``change`` (see
change.py) or ``ablation`` (see ablation.py). A row has a ``kind`` too: ``budget`` for those made
here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdk_kv.measure import Load, Outcome, cached_share, outcome_from
from spdk_kv.units import GIB

VARIANTS = ("flexllmgen", "strong", "direct", "pagecache", "dual")

Sample = Mapping[str, Any]
Row = dict[str, Any]


def bounds_s(
    nbytes: float, share: float, load: Load, drive_gib_s: float, copy_gib_s: float
) -> tuple[float, float]:
    """The least seconds for reading ``nbytes`` where the page cache may hold ``share`` of the KV
    cache: the drive and the memory one after the other, and side by side."""
    cached = min(nbytes, share * load.nbytes)
    from_drive = (nbytes - cached) / GIB / drive_gib_s
    from_memory = cached / GIB / copy_gib_s
    return from_drive + from_memory, max(from_drive, from_memory)


@dataclass(frozen=True)
class Yardsticks:
    """What everything is compared with, in GiB/s: medians over all that was measured of it."""

    load: Load
    read_gib_s: float
    write_gib_s: float
    copy_gib_s: float

    @property
    def columns(self) -> Row:
        return {
            "fio_read_gib_s": self.read_gib_s,
            "fio_write_gib_s": self.write_gib_s,
            "memory_copy_gib_s": self.copy_gib_s,
        }

    def bounds_s(self, nbytes: float, share: float) -> tuple[float, float]:
        return bounds_s(nbytes, share, self.load, self.read_gib_s, self.copy_gib_s)


def yardsticks_of(samples: Sequence[Sample]) -> Yardsticks:
    """ValueError where a kind is missing."""
    return Yardsticks(
        load_of(samples),
        _median(samples, "fio", "read_gib_s"),
        _median(samples, "fio", "write_gib_s"),
        _median(samples, "copy", "gib_s"),
    )


def make_rows(samples: Iterable[Sample]) -> list[Row]:
    """Sorted by budget, then variants in their usual order. ValueError where a kind is missing."""
    samples = list(samples)
    sticks = yardsticks_of(samples)
    runs: dict[tuple[float, str], list[Outcome]] = {}
    for sample in samples:
        if sample["kind"] == "case":
            key = (sample["rho"], sample["outcome"]["variant"])
            runs.setdefault(key, []).append(outcome_from(sample["outcome"]))
    rows = [
        {"kind": "budget", "rho": rho, "variant": variant, **row_of(outcomes, rho, sticks)}
        for (rho, variant), outcomes in sorted(runs.items(), key=lambda item: _place(item[0]))
    ]
    best = {row["rho"]: row["decode_s_p50"] for row in rows if row["variant"] == "dual"}
    for row in rows:
        ours, theirs = best.get(row["rho"]), row["decode_s_p50"]
        row["decode_s_over_duals"] = theirs / ours if ours and theirs else None
    return rows


def row_of(outcomes: Sequence[Outcome], rho: float, sticks: Yardsticks) -> Row:
    """The figures of runs that had the same settings; those that failed count in none of them."""
    good = [outcome for outcome in outcomes if not outcome.error]
    errors = sorted({outcome.error for outcome in outcomes if outcome.error})
    figures = _figures(good, rho, sticks) if good else dict.fromkeys(_FIGURES)
    return {"runs": len(outcomes), "errors": errors, **sticks.columns, **figures}


def load_of(samples: Iterable[Sample]) -> Load:
    """The load that the samples are of."""
    for sample in samples:
        if sample["kind"] == "about":
            return Load(**sample["load"])
    raise ValueError("no sample says which load was measured")


_FIGURES = (
    *("decode_s_p50", "decode_s_p25", "decode_s_p75", "decode_first_s", "decode_mean_s"),
    *("prefill_s_p50", "prefill_s_p25", "prefill_s_p75", "prefill_cpu_s"),
    *("bound_s", "bound_overlapped_s", "of_bound", "read_gib_s", "device_gib_s", "utilisation"),
    *("hit_rate", "x_nbytes", "cached_nbytes", "cached_share"),
    *("major_faults_per_token", "cpu_s_per_token", "limit_nbytes", "other_nbytes"),
)


def _figures(outcomes: Sequence[Outcome], rho: float, sticks: Yardsticks) -> Row:
    nbytes = statistics.fmean(one.step_nbytes for one in outcomes)
    share = _middle(cached_share(one, sticks.load) for one in outcomes)
    # Samples of earlier versions do not say what was left to the page cache.
    one_after_other, side_by_side = sticks.bounds_s(nbytes, rho if share is None else share)
    p25, p50, p75 = quartiles([one.step_s for one in outcomes])
    prefill = quartiles([one.prefill_s for one in outcomes])
    device_bytes_s = _middle(one.drive_bytes_s for one in outcomes)
    device_gib_s = None if device_bytes_s is None else device_bytes_s / GIB
    residency = [one.explained.get("residency") or {} for one in outcomes]
    figures = (
        *(p50, p25, p75, statistics.median(one.steps_s[0] for one in outcomes)),
        statistics.fmean(step for one in outcomes for step in one.steps_s),
        *(prefill[1], prefill[0], prefill[2]),
        statistics.median(one.prefill_cpu_s for one in outcomes),
        *(one_after_other, side_by_side, p50 / one_after_other, nbytes / GIB / p50),
        *(device_gib_s, None if device_gib_s is None else device_gib_s / sticks.read_gib_s),
        _middle(one.hit_rate for one in outcomes),
        *(
            _middle(one.get(name) for one in residency)
            for name in ("budget_nbytes", "cached_nbytes")
        ),
        share,
        statistics.median(one.major_faults / len(one.steps_s) for one in outcomes),
        statistics.median(one.cpu_s / len(one.steps_s) for one in outcomes),
        *(outcomes[0].limit_nbytes, max(one.other_nbytes for one in outcomes)),
    )
    return dict(zip(_FIGURES, figures, strict=True))


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25 %, the median, and 75 %."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _median(samples: Iterable[Sample], kind: str, name: str) -> float:
    found = [sample[name] for sample in samples if sample["kind"] == kind]
    if not found:
        raise ValueError(f"no sample of kind {kind!r}")
    return statistics.median(found)


def _place(key: tuple[float, str]) -> tuple[float, int, str]:
    rho, variant = key
    known = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return rho, known, variant
