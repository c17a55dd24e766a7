"""What `spdk-kv top` says of a store: rows of text, for a terminal and for a pipe alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdk_kv.cli.top.rates import OperationRates, Rates
from spdk_kv.cli.watched import Seen
from spdk_kv.metrics import Sample
from spdk_kv.units import GIB, format_nbytes

PATH_COLUMNS = ("path", "op", "bytes/s", "requests/s", "commands/s", "depth", "p50", "p99")
SEQUENCE_COLUMNS = ("sequence", "size", "in memory", "read/s", "written/s")
_ALWAYS = ("read", "write")


@dataclass(frozen=True)
class View:
    """``facts``: (name, text). ``paths`` and ``sequences``: rows of the columns above."""

    title: str
    facts: Sequence[tuple[str, str]]
    paths: Sequence[Sequence[str]] = ()
    sequences: Sequence[Sequence[str]] = ()
    more_sequences: int = 0


def view_of(name: str, seen: Seen, rates: Rates | None, most_sequences: int) -> View:
    """``rates`` is None where there is but one reading yet."""
    if seen.owner is None:
        return View(name, [("owner", "none; no process has the store open")])
    if seen.reading is None:
        return View(name, [("owner", f"process {seen.owner}; {seen.trouble}")])
    reading, sample = seen.reading, seen.reading.sample
    open_s = sample.time_s + reading.age_s - sample.opened_s
    owner = f"process {reading.pid}, open for {duration(open_s)}"
    if reading.is_stale:
        owner += f"; has told nothing for {duration(reading.age_s)}: is it stopped, or stuck?"
        rates = None  # nobody knows what it does
    per_s = rates.held if rates else {}
    rows = sample.sequences[:most_sequences]
    facts = [
        ("owner", owner),
        ("holds", _holds(sample)),
        ("gets", _gets(sample, per_s)),
        ("lost", _lost(sample)),
        *_budget(sample),
        ("memory", _memory(sample)),
        ("CPU", _cpu(sample, rates)),
    ]
    return View(
        name,
        facts,
        _path_rows(sample, rates),
        [_sequence_row(each, rates) for each in rows],
        len(sample.sequences) - len(rows),
    )


def _holds(sample: Sample) -> str:
    held = sample.held
    share = held["used_nbytes"] / max(1, held["capacity_nbytes"])
    return (
        f"{format_nbytes(held['used_nbytes'])} of {format_nbytes(held['capacity_nbytes'])} "
        f"({share:.0%}): {held['blobs']:,} blobs, sequences: {held['sequences']:,}"
    )


def _gets(sample: Sample, per_s: Mapping[str, float]) -> str:
    hits, misses = sample.held["hits"], sample.held["misses"]
    if not hits + misses:
        return "none so far"
    text = f"{hits / (hits + misses):.1%} of {hits + misses:,} keys found"
    if per_s:
        text += f"; now {number(per_s['hits'])} hits/s, {number(per_s['misses'])} misses/s"
    return text


def _lost(sample: Sample) -> str:
    held = sample.held
    text = f"{held['evictions']:,} evicted, {held['corruptions']:,} found damaged"
    failed = sum(each.errors for path in sample.paths.values() for each in path.ops.values())
    if failed:
        text += f", {failed:,} failed requests"
    if held["failed_background_flushes"]:
        text += f", {held['failed_background_flushes']:,} failed flushes"
    return text


def _budget(sample: Sample) -> list[tuple[str, str]]:
    held = sample.held
    if "write_budget_nbytes" not in held:
        return []
    left = format_nbytes(max(0, held["write_budget_left_nbytes"]))
    budget = f"{format_nbytes(held['write_budget_nbytes'])} in {_period(held)}"
    return [("writes", f"{left} left of {budget}; {held['declined_writes']:,} declined")]


def _period(held: Mapping[str, float]) -> str:
    return (
        duration(held["write_budget_period_s"])
        .removesuffix(" 0 h")
        .removesuffix(" 0 min")
        .removesuffix(" 0 s")
    )


def _memory(sample: Sample) -> str:
    held = sample.held
    staging = f"staging {format_nbytes(held['staging_leased_nbytes'])}"
    cache = sample.paths.get("page_cache")
    if "budget_nbytes" not in held or cache is None:
        return f"one path, no budget; {staging}"
    units = sum(path.units for path in sample.paths.values())
    return (
        f"page cache {format_nbytes(cache.units_nbytes)} of {format_nbytes(held['budget_nbytes'])} "
        f"({cache.units:,} of {units:,} units); {staging}"
    )


def _cpu(sample: Sample, rates: Rates | None) -> str:
    if rates is None or rates.cpu is None:
        return f"{sample.cpu_ns / 1e9:.1f} s in all"
    text = f"{rates.cpu:.2f} cores, {rates.engine_cpu:.2f} of them the engines' threads"
    if rates.nbytes >= 1 << 20:
        text += f"; {rates.cpu / rates.nbytes * GIB:.2f} s/GiB"
    return text


def _path_rows(sample: Sample, rates: Rates | None) -> list[list[str]]:
    found = {(each.path, each.op): each for each in rates.operations} if rates else {}
    rows = []
    for name, path in sample.paths.items():
        first = True
        for op, counted in path.ops.items():
            if op not in _ALWAYS and not counted.transfers:
                continue
            depth = "-"
            if rates is not None and first and rates.depth.get(name):
                depth = f"{rates.depth[name]:.1f}"
            label = f"{name.replace('_', ' ')}" if first else ""
            rows.append(
                [label, op, *_operation_cells(found.get((name, op)), depth if first else "")]
            )
            first = False
    return rows


def _operation_cells(rates: OperationRates | None, depth: str) -> list[str]:
    if rates is None:
        return ["-", "-", "-", depth, "-", "-"]
    return [
        format_nbytes(rates.nbytes) if rates.nbytes else "0",
        number(rates.transfers),
        number(rates.ios),
        depth,
        seconds(rates.p50_s),
        seconds(rates.p99_s),
    ]


def _sequence_row(each: Mapping[str, Any], rates: Rates | None) -> list[str]:
    per_s = rates.sequences.get(each["name"]) if rates else None
    speeds = ["-", "-"] if per_s is None else [format_nbytes(of) if of else "0" for of in per_s]
    share = each["cached_nbytes"] / each["nbytes"] if each["nbytes"] else 0.0
    return [str(each["name"]), format_nbytes(each["nbytes"]), f"{share:.0%}", *speeds]


def number(value: float) -> str:
    """A rate: whole, unless it is small."""
    return f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """A short time, with two digits that count or more."""
    if value is None:
        return "-"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def duration(value: float) -> str:
    """A long time."""
    if value < 60:
        return f"{max(0.0, value):.0f} s"
    if value < 3600:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
    if value < 86400:
        return f"{value // 3600:.0f} h {value % 3600 // 60:.0f} min"
    return f"{value // 86400:.0f} d {value % 86400 // 3600:.0f} h"


def clock() -> str:
    """The time of day, for a title."""
    return time.strftime("%H:%M:%S")
