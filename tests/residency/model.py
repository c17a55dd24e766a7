"""A page cache as it is at its worst, to try residency policies on: strict LRU, so that a cyclic
scan over one page too many misses everything. Pure numbers; a page is a MiB."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from spdk_kv.residency.edge import margin
from spdk_kv.residency.policies import Decision, Observation, Policy, Unit
from spdk_kv.units import MIB

Page = tuple[Hashable, int]


@dataclass
class Scan:
    """What was decided before a scan, and what its reads through the page cache found.

    ``over``: the kept units were more than the kernel gave when the scan ended.
    """

    decision: Decision
    moved: int
    hit: int
    missed: int
    filled: int
    over: bool

    @property
    def thrashed(self) -> bool:
        """Missed what a decision should have spared it, rather than filling what is to stay."""
        return self.over and self.missed > (self.hit + self.missed + self.filled) // 50


@dataclass
class Machine:
    """Layers of K and V that are scanned over and over, through an LRU cache or around it.

    ``edge``: pages that the kernel really gives. ``promise``: the available memory that the
    kernel reports, in pages.
    ``tells_resident``: whether the kernel tells what it holds (cachestat). ``alarm``: misses, as a
    share of the budget, that call for a decision at once.
    """

    policy: Policy
    edge: int
    promise: int
    layers: int = 32
    pages: int = 64
    rows: int = 0
    tells_resident: bool = True
    alarm: float = 1.0
    pressure: float = 0.0
    lru: OrderedDict[Page, None] = field(default_factory=OrderedDict)
    cached: frozenset[Hashable] = frozenset()
    warmed: dict[Hashable, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=lambda: {"hit": 0, "missed": 0})
    scans: list[Scan] = field(default_factory=list)

    def units(self) -> list[Unit]:
        return [
            Unit((layer, part), self.pages * MIB) for layer in range(self.layers) for part in (0, 1)
        ]

    @property
    def budget(self) -> int:
        """In pages."""
        return self.scans[-1].decision.budget_nbytes // MIB

    def decide(self) -> tuple[Decision, int]:
        units = self.units()
        resident = sum(key in self.cached for key, _ in self.lru) * MIB
        decision = self.policy.decide(
            units,
            self.cached,
            Observation(
                available_nbytes=self.promise * MIB,
                hit_nbytes=self.seen["hit"] * MIB,
                missed_nbytes=self.seen["missed"] * MIB,
                pressure=self.pressure,
                resident_nbytes=resident if self.tells_resident and self.seen["missed"] else None,
            ),
        )
        sizes = {unit.key: unit.nbytes for unit in units}
        assert sum(sizes[key] for key in decision.cached) <= decision.budget_nbytes
        available = self.promise * MIB
        assert decision.budget_nbytes <= available - margin(available) // 2
        moved = len(decision.cached ^ self.cached)
        for key in self.cached - decision.cached:  # POSIX_FADV_DONTNEED
            self.warmed.pop(key, None)
            for page in range(self.pages):
                self.lru.pop((key, page), None)
        self.cached = decision.cached
        self.seen = {"hit": 0, "missed": 0}
        return decision, moved

    def scan(self, during: Callable[[int], None] = lambda place: None) -> Scan:
        """Decides, and scans once; ``during`` is called before each unit with its place."""
        decision, moved = self.decide()
        scan = Scan(decision, moved, 0, 0, 0, False)
        for place, unit in enumerate(self.units()):
            during(place)
            self.shrink()
            if unit.key in self.cached:
                self.read(unit.key, scan)
                if self.seen["missed"] * MIB > self.alarm * scan.decision.budget_nbytes:
                    scan.decision, more = self.decide()
                    scan.moved += more
        scan.over = len(self.cached) * self.pages > self.edge
        self.pages += self.rows
        self.scans.append(scan)
        return scan

    def read(self, key: Hashable, scan: Scan) -> None:
        for page in range(self.pages):
            if (key, page) in self.lru:
                self.lru.move_to_end((key, page))
                scan.hit += 1
                self.seen["hit"] += 1
                continue
            self.lru[key, page] = None
            self.shrink()
            if self.warmed.get(key, 0) < self.pages:
                self.warmed[key] = self.warmed.get(key, 0) + 1
                scan.filled += 1
            else:
                scan.missed += 1
                self.seen["missed"] += 1

    def shrink(self) -> None:
        while len(self.lru) > self.edge:
            self.lru.popitem(last=False)

    def run(self, scans: int) -> list[Scan]:
        return [self.scan() for _ in range(scans)]


def longest(flags: Iterable[bool]) -> int:
    """The length of the longest run of True."""
    most = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        most = max(most, run)
    return most
