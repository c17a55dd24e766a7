"""What is compared with what by against_fio.py, and what each comparison should reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import record
from record import Target
from runs import drive

SMALL = "16 KiB"
"""What the comparisons of small commands have in their labels."""


@dataclass(frozen=True)
class Comparison:
    """``run`` against ``yardstick``: at least ``bound`` times its speed, at most ``bound`` times
    its CPU time, or at most ``bound`` CPU-seconds per GiB more. No bound: for information."""

    label: str
    run: str
    yardstick: str
    kind: Literal["speed", "cpu", "extra cpu"]
    bound: float | None

    def value(self, figure: drive.Figure) -> float:
        return figure.gib_s if self.kind == "speed" else figure.cpu_s_per_gib

    @property
    def unit(self) -> str:
        return "GiB/s" if self.kind == "speed" else "s/GiB"

    @property
    def target(self) -> Target | None:
        if self.bound is None:
            return None
        return Target("at least" if self.kind == "speed" else "at most", self.bound)

    def compared(self, ours: Sequence[float], theirs: Sequence[float]) -> record.Figure:
        """The figure of these rounds, each compared within itself."""
        if self.kind == "extra cpu":
            more = [a - b for a, b in zip(ours, theirs, strict=True)]
            return record.figure(self.label, more, "s/GiB more", self.target)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return record.figure(self.label, ratios, "of fio", self.target)


@dataclass(frozen=True)
class Cost:
    """``figure`` of own_cost.py in ``unit``, at most ``most``; None: for information."""

    label: str
    figure: str
    unit: str
    most: float | None

    def measured(self, value: float) -> record.Figure:
        target = None if self.most is None else Target("at most", self.most)
        return record.figure(self.label, [value], self.unit, target)


def _comparisons() -> tuple[Comparison, ...]:
    found = []
    for op in ("read", "write"):
        # Our buffers are on hugepages; fio's are not by default. Compared with both.
        for yardstick in (f"fio {op}", f"fio {op}, hugepages"):
            label = f"{op} 1 MiB x 16" + (", fio on hugepages" if "huge" in yardstick else "")
            found.append(Comparison(label, f"uring {op}", yardstick, "speed", 0.95))
            found.append(Comparison(f"CPU, {label}", f"uring {op}", yardstick, "cpu", 1.15))
        summed = f"uring {op}, checksum"
        found += [
            Comparison(f"checksum, {op}", summed, f"uring {op}", "extra cpu", 0.05),
            Comparison(f"{op} with checksum", summed, f"fio {op}, hugepages", "speed", None),
            Comparison(f"threads, {op}", f"threads {op}", f"fio {op}, hugepages", "speed", None),
            Comparison(f"pagecache, warm, {op}", f"pagecache {op}", f"fio {op}", "speed", None),
        ]
    found += [
        Comparison("get, 64 MiB", "get", "fio read", "speed", 0.90),
        Comparison("get, fio on hugepages", "get", "fio read, hugepages", "speed", 0.90),
        Comparison("get, no checksum", "get, no checksum", "fio read, hugepages", "speed", None),
        # Ordinary tensors lie on small pages, as fio's buffers do.
        Comparison("get out=, 64 MiB", "get out=", "fio read", "speed", 0.90),
        Comparison("put, 64 MiB", "put", "fio write", "speed", 0.90),
        Comparison("put and flush, 64 MiB", "put and flush", "fio write", "speed", None),
        Comparison("1,000 x 16 KiB at random", "one transfer", "fio randread", "speed", 0.90),
        Comparison(
            "16 KiB x 64 at random, steady", "uring randread", "fio randread", "speed", 0.97
        ),
        Comparison(
            "CPU, 16 KiB x 64 at random, steady", "uring randread", "fio randread", "cpu", 1.15
        ),
        Comparison(
            "16 KiB x 64 at random, steady, fio on hugepages",
            "uring randread",
            "fio randread, hugepages",
            "speed",
            None,
        ),
        Comparison("threads, steady randread", "threads randread", "fio randread", "speed", None),
        Comparison(
            "pagecache, warm, randread", "pagecache randread", "fio randread", "speed", None
        ),
    ]
    return tuple(found)


COMPARISONS = _comparisons()

COSTS = (
    Cost("small get, null engine", "get_us", "us", 20),
    Cost("small get with out=, null engine", "get_out_us", "us", 20),
    Cost("small put, null engine", "put_us", "us", None),
    Cost("segment of a transfer of 10,000", "segment_us", "us", 1),
    Cost("memory of the blobs' records, after put", "put_memory_mib", "MiB", 100),
    Cost("memory of the blobs' records, reopened", "reopen_memory_mib", "MiB", 100),
    Cost("reopening", "reopen_s", "s", 2),
)
