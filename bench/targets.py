"""What is compared with what, and what is to be reached ("Speed and memory to reach")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drive_runs import Figure


@dataclass(frozen=True)
class DriveTarget:
    """``run`` against ``yardstick``: at least ``bound`` times its speed, at most ``bound`` times
    its CPU time, or at most ``bound`` CPU-seconds per GiB more. No bound: for information."""

    label: str
    run: str
    yardstick: str
    kind: Literal["speed", "cpu", "extra cpu"]
    bound: float | None

    def value(self, figure: Figure) -> float:
        return figure.gib_s if self.kind == "speed" else figure.cpu_s_per_gib

    @property
    def unit(self) -> str:
        return "GiB/s" if self.kind == "speed" else "s/GiB"

    def compare(self, ours: float, theirs: float) -> float:
        return ours - theirs if self.kind == "extra cpu" else ours / theirs

    @property
    def wanted(self) -> str:
        if self.bound is None:
            return ""
        if self.kind == "extra cpu":
            return f"at most {self.bound:g} s/GiB more"
        return f"at {'least' if self.kind == 'speed' else 'most'} {self.bound:g}"

    def verdict(self, compared: float) -> str:
        if self.bound is None:
            return ""
        good = compared >= self.bound if self.kind == "speed" else compared <= self.bound
        return "met" if good else "missed"


@dataclass(frozen=True)
class SoftwareTarget:
    """``figure`` of software_runs, at most ``most``; None: for information."""

    label: str
    figure: str
    unit: str
    most: float | None


def _drive_targets() -> tuple[DriveTarget, ...]:
    found = []
    for op in ("read", "write"):
        # Our buffers are on hugepages; fio's are not unless it is told to. Against both.
        for yardstick in (f"fio {op}", f"fio {op}, hugepages"):
            label = f"{op} 1 MiB x 16" + (", fio on hugepages" if "huge" in yardstick else "")
            found.append(DriveTarget(label, f"uring {op}", yardstick, "speed", 0.95))
            found.append(DriveTarget(f"CPU, {label}", f"uring {op}", yardstick, "cpu", 1.15))
        summed = f"uring {op}, checksum"
        found += [
            DriveTarget(f"checksum, {op}", summed, f"uring {op}", "extra cpu", 0.05),
            DriveTarget(f"{op} with checksum", summed, f"fio {op}, hugepages", "speed", None),
            DriveTarget(f"threads, {op}", f"threads {op}", f"fio {op}, hugepages", "speed", None),
            DriveTarget(f"pagecache, warm, {op}", f"pagecache {op}", f"fio {op}", "speed", None),
        ]
    found += [
        DriveTarget("get, 64 MiB", "get", "fio read", "speed", 0.90),
        DriveTarget("get, fio on hugepages", "get", "fio read, hugepages", "speed", 0.90),
        DriveTarget("get, no checksum", "get, no checksum", "fio read, hugepages", "speed", None),
        # Ordinary tensors lie on small pages, as fio's buffers do.
        DriveTarget("get out=, 64 MiB", "get out=", "fio read", "speed", 0.90),
        DriveTarget("put, 64 MiB", "put", "fio write", "speed", 0.90),
        DriveTarget("put and flush, 64 MiB", "put and flush", "fio write", "speed", None),
        DriveTarget("1,000 x 16 KiB at random", "one transfer", "fio randread", "speed", 0.90),
        DriveTarget("uring, steady randread", "uring randread", "fio randread", "speed", None),
        DriveTarget("threads, steady randread", "threads randread", "fio randread", "speed", None),
        DriveTarget(
            "pagecache, warm, randread", "pagecache randread", "fio randread", "speed", None
        ),
    ]
    return tuple(found)


DRIVE_TARGETS = _drive_targets()

SOFTWARE_TARGETS = (
    SoftwareTarget("small get, null engine", "get_us", "us", 20),
    SoftwareTarget("small get with out=, null engine", "get_out_us", "us", 20),
    SoftwareTarget("small put, null engine", "put_us", "us", None),
    SoftwareTarget("segment of a transfer of 10,000", "segment_us", "us", 1),
    SoftwareTarget("memory of the blobs' records, after put", "put_memory_mib", "MiB", 100),
    SoftwareTarget("memory of the blobs' records, reopened", "reopen_memory_mib", "MiB", 100),
    SoftwareTarget("reopening", "reopen_s", "s", 2),
)
