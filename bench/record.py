"""The form in which every benchmark keeps its figures: records, as JSON.

A record answers one question (see QUESTIONS) on one drive. A file holds a list of records. The
newest record of each question and drive makes RESULTS.md (results_page.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date as calendar
from pathlib import Path
from typing import Any

import machine

QUESTIONS = (
    "fio",
    "small",
    "spdk_perf",
    "decode",
    "pipeline",
    "own_cost",
    "cached_decode",
    "sequences",
    "prompts",
    "reading_a_part",
    "host_vllm",
    "host_lmcache",
    "host_sglang",
    "host_llama_cpp",
)
SPDK_KV, DUAL_BLADE = "spdk_kv", "DUAL-BLADE"
ASKERS = (SPDK_KV, DUAL_BLADE)
SIDES = ("at least", "at most")


@dataclass(frozen=True)
class Target:
    """What a figure should reach, and who asked for it (one of ASKERS)."""

    side: str
    bound: float
    asked_by: str = SPDK_KV

    @property
    def text(self) -> str:
        return f"{self.side} {self.bound:g}"

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.side == "at least" else value <= self.bound

    def share(self, value: float) -> float:
        """How far ``value`` is, as a factor: above 1 is better than what was asked, at most 1,000
        times where there is nothing of what was to be little."""
        if self.side == "at least":
            return value / self.bound
        return self.bound / max(value, self.bound / 1000)


@dataclass(frozen=True)
class Figure:
    """The median of ``value`` over the rounds in ``unit``, with the lowest and highest round where
    there was more than one. No target: for information."""

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    target: Target | None = None

    @property
    def wanted(self) -> str:
        """Such as "at least 0.9", or "" where nothing was asked."""
        return "" if self.target is None else self.target.text

    @property
    def verdict(self) -> str:
        """One of "met", "missed", or "" where nothing was asked."""
        if self.target is None:
            return ""
        return "met" if self.target.is_met(self.value) else "missed"


def figure(what: str, values: Sequence[float], unit: str, target: Target | None = None) -> Figure:
    """The figure of these rounds."""
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    return Figure(what, statistics.median(values), unit, low, high, target)


@dataclass(frozen=True)
class Side:
    """How ``by`` did ``what``, which others did in the same rounds: ``measured`` are the columns of
    a table, each named by its figure's ``what``."""

    what: str
    by: str
    measured: list[Figure]


@dataclass(frozen=True)
class Record:
    """``drive``: "disk", or what simulates one. ``report``: the file that the figures were copied
    from, "" where the benchmark wrote this record itself. ``runs``: every single figure. ``sides``:
    what was compared, side by side."""

    question: str
    drive: str
    date: str
    commit: str
    machine: list[str]
    method: str
    figures: list[Figure]
    report: str = ""
    runs: Any = None
    sides: list[Side] = field(default_factory=list)


def short(drive: str) -> str:
    """A drive's name without what simulates it: "simulated", or what it is reached over."""
    head, _, rest = drive.partition(" (")
    inside, _, tail = rest.partition(")")
    if "vfio-user" in inside:
        return f"vfio-user{tail}"
    return f"VFIO{tail}" if "VFIO" in inside else f"{head}{tail}"


def today(
    question: str,
    drive: str,
    lines: Iterable[str],
    method: str,
    figures: Iterable[Figure],
    runs: Any = None,
    sides: Iterable[Side] = (),
) -> Record:
    """A record of what was measured just now, by this checkout. ``lines``: the machine's."""
    return Record(
        question,
        drive,
        calendar.today().isoformat(),
        machine.commit(),
        list(lines),
        method,
        list(figures),
        runs=runs,
        sides=list(sides),
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """Writes all records of one call of a benchmark into ``path``."""
    content = json.dumps([asdict(one) for one in records], indent=2)
    path.write_text(content + "\n", encoding="utf-8")


def read(path: Path) -> list[Record]:
    """The records in ``path``. ValueError names what is wrong with them."""
    try:
        return [_record(one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, ValueError) as wrong:
        raise ValueError(f"{path.name} is not a list of records: {wrong}") from None


def _record(found: dict[str, Any]) -> Record:
    figures = [_figure(one) for one in found["figures"]]
    sides = [
        Side(**{**side, "measured": [_figure(one) for one in side["measured"]]})
        for side in found.get("sides", ())
    ]
    record = Record(**{**found, "figures": figures, "sides": sides})
    calendar.fromisoformat(record.date)
    for name in ("drive", "commit", "machine", "method", "figures"):
        if not getattr(record, name):
            raise ValueError(f"{name} is empty")
    if record.question not in QUESTIONS:
        raise ValueError(f"unknown question {record.question!r}")
    return record


def _figure(found: dict[str, Any]) -> Figure:
    target = None if found["target"] is None else Target(**found["target"])
    if target and (target.side not in SIDES or target.asked_by not in ASKERS):
        raise ValueError(f"unknown target {target}")
    made = Figure(**{**found, "target": target})
    if not (made.what and made.unit) or not isinstance(made.value, int | float):
        raise ValueError(f"a figure without a name, unit or value: {found}")
    return made
