"""From samples to rows: one row per budget and variant, medians and quartiles over the runs.

A sample is a JSON object with a ``kind``: ``about`` (the load, the machine), ``fio`` (the drive),
``copy`` (the memory), ``probe`` (a variant's own memory) or ``case`` (one run).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spdk_kv.cli.decode_case import Outcome, outcome_from
from spdk_kv.cli.decode_load import Load
from spdk_kv.units import GIB

VARIANTS = ("flexllmgen", "strong", "direct", "pagecache", "dual")

Sample = Mapping[str, Any]
Row = dict[str, Any]


def limit_nbytes(other_nbytes: int, rho: float, load: Load) -> int:
    """The memory limit: the variant's own memory, and ``rho`` of the KV cache for the page
    cache."""
    return other_nbytes + round(rho * load.nbytes)


def bounds_s(
    nbytes: float, rho: float, load: Load, drive_gib_s: float, copy_gib_s: float
) -> tuple[float, float]:
    """The least seconds for reading ``nbytes`` where the page cache may hold ``rho`` of the KV
    cache: the drive and the memory one after the other, and side by side."""
    cached = min(nbytes, rho * load.nbytes)
    from_drive = (nbytes - cached) / GIB / drive_gib_s
    from_memory = cached / GIB / copy_gib_s
    return from_drive + from_memory, max(from_drive, from_memory)


def make_rows(samples: Iterable[Sample]) -> list[Row]:
    """Sorted by budget, then variants in their usual order. ValueError where a kind is missing."""
    samples = list(samples)
    load = load_of(samples)
    read = _median(samples, "fio", "read_gib_s")
    write = _median(samples, "fio", "write_gib_s")
    copy = _median(samples, "copy", "gib_s")
    runs: dict[tuple[float, str], list[Outcome]] = {}
    for sample in samples:
        if sample["kind"] == "case":
            key = (sample["rho"], sample["outcome"]["variant"])
            runs.setdefault(key, []).append(outcome_from(sample["outcome"]))
    rows = []
    for (rho, variant), outcomes in sorted(runs.items(), key=lambda item: _place(item[0])):
        row: Row = {"rho": rho, "variant": variant, "runs": len(outcomes)}
        good = [outcome for outcome in outcomes if not outcome.error]
        row["errors"] = sorted({outcome.error for outcome in outcomes if outcome.error})
        row |= {"fio_read_gib_s": read, "fio_write_gib_s": write, "memory_copy_gib_s": copy}
        row |= _figures(good, rho, load, read, copy) if good else dict.fromkeys(_FIGURES)
        rows.append(row)
    best = {row["rho"]: row["decode_s_p50"] for row in rows if row["variant"] == "dual"}
    for row in rows:
        ours, theirs = best.get(row["rho"]), row["decode_s_p50"]
        row["x_of_dual"] = theirs / ours if ours and theirs else None
    return rows


def load_of(samples: Iterable[Sample]) -> Load:
    """The load that the samples are of."""
    for sample in samples:
        if sample["kind"] == "about":
            return Load(**sample["load"])
    raise ValueError("no sample says which load was measured")


_FIGURES = (
    *("decode_s_p50", "decode_s_p25", "decode_s_p75", "decode_s_mean", "decode_s_worst"),
    *("prefill_s_p50", "prefill_s_p25", "prefill_s_p75", "prefill_cpu_s"),
    *("bound_s", "bound_overlapped_s", "of_bound", "read_gib_s", "device_gib_s", "utilisation"),
    *("hit_rate", "major_faults_per_token", "cpu_s_per_token", "limit_nbytes", "other_nbytes"),
)


def _figures(outcomes: Sequence[Outcome], rho: float, load: Load, read: float, copy: float) -> Row:
    nbytes = statistics.fmean(one.asked_nbytes / len(one.steps_s) for one in outcomes)
    one_after_other, side_by_side = bounds_s(nbytes, rho, load, read, copy)
    decode = [one.step_s for one in outcomes]
    prefill = [one.prefill_s for one in outcomes]
    p25, p50, p75 = _quartiles(decode)
    steps = [step for one in outcomes for step in one.steps_s]
    device = [
        one.device_nbytes / GIB / sum(one.steps_s)
        for one in outcomes
        if one.device_nbytes is not None
    ]
    hits = [one.hit_rate for one in outcomes if one.hit_rate is not None]
    device_gib_s = statistics.median(device) if device else None
    figures = (
        *(p50, p25, p75, statistics.fmean(steps), max(steps)),
        *(lambda quartiles: (quartiles[1], quartiles[0], quartiles[2]))(_quartiles(prefill)),
        statistics.median(one.prefill_cpu_s for one in outcomes),
        *(one_after_other, side_by_side, p50 / one_after_other, nbytes / GIB / p50),
        *(device_gib_s, None if device_gib_s is None else device_gib_s / read),
        statistics.median(hits) if hits else None,
        statistics.median(one.major_faults / len(one.steps_s) for one in outcomes),
        statistics.median(one.cpu_s / len(one.steps_s) for one in outcomes),
        *(outcomes[0].limit_nbytes, max(one.other_nbytes for one in outcomes)),
    )
    return dict(zip(_FIGURES, figures, strict=True))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
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
