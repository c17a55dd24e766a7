"""What a store has counted at one moment, and its form as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPERATIONS = ("read", "write", "flush", "discard")

Times = Mapping[int, int]
"""A histogram: the nanoseconds below which a bucket ends -> its count. Empty buckets are left out.
There are four to each doubling."""

# What of `held` changes while nothing is done.
_BY_ITSELF = ("write_budget_left_nbytes",)


@dataclass(frozen=True)
class Operation:
    """What one path did of one operation since the store was opened. Times are in nanoseconds.

    ``ios``: commands to the drive, and ``nbytes`` what they moved. ``transfers``: requests, each
    with any number of commands; ``errors``: those that failed. ``latency_ns`` and ``latency`` are
    of commands, ``took_ns`` and ``took`` of transfers, from submission to end.
    """

    ios: int
    nbytes: int
    latency_ns: int
    transfers: int
    errors: int
    took_ns: int
    latency: Times
    took: Times


@dataclass(frozen=True)
class Path:
    """One way to the drive. ``ops`` has all of OPERATIONS.

    ``depth``: commands that are to be in flight, ``deepest``: the most that were,
    ``depth_reached``: how many were on average while there were any. ``busy_ns``: how long there
    were any. ``cpu_ns``: CPU time of the engine's own threads. ``units``: layers' K and V of
    sequences that are on this path.
    """

    engine: str
    depth: int
    deepest: int
    depth_reached: float
    busy_ns: int
    cpu_ns: int
    bounced_nbytes: int
    units: int
    units_nbytes: int
    ops: Mapping[str, Operation]


@dataclass(frozen=True)
class Sample:
    """What a store has counted since it was opened.

    Attributes:
        store: its URI.
        time_s: when this was, Unix time.
        clock_s: when this was, by a clock that never jumps; to divide by.
        opened_s: when the store was opened, Unix time.
        cpu_ns: CPU time of its process.
        held: numbers of the store as a whole, by the names that `names.py` has.
        paths: by name: ``direct``, ``page_cache`` or ``memory``; the store's own engine first.
        sequences: for each of those used last: ``name``, ``units``, ``cached_units``, ``nbytes``,
            ``cached_nbytes``, ``read_nbytes`` and ``written_nbytes``.
    """

    store: str
    time_s: float
    clock_s: float
    opened_s: float
    cpu_ns: int
    held: Mapping[str, int]
    paths: Mapping[str, Path]
    sequences: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold; parts of it are the sample's own."""
        # Not dataclasses.asdict, which copies everything and took most of what telling costs.
        paths = {
            name: {**vars(path), "ops": {op: vars(each) for op, each in path.ops.items()}}
            for name, path in self.paths.items()
        }
        return {**vars(self), "paths": paths}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Sample:
        """What :meth:`to_json` made. KeyError, TypeError, ValueError or AttributeError where it is
        something else."""
        rest = {name: value for name, value in found.items() if name in cls.__dataclass_fields__}
        paths = {name: _path(fields) for name, fields in found["paths"].items()}
        return cls(**{**rest, "paths": paths, "sequences": tuple(found["sequences"])})

    def same_activity(self, other: Sample | None) -> bool:
        """Whether nothing was done between the two, but for spending CPU time."""
        return other is not None and (
            (self._done(), self.sequences) == (other._done(), other.sequences)
            and {name: path.ops for name, path in self.paths.items()}
            == {name: path.ops for name, path in other.paths.items()}
        )

    def _done(self) -> dict[str, int]:
        return {name: value for name, value in self.held.items() if name not in _BY_ITSELF}


def _path(fields: Mapping[str, Any]) -> Path:
    ops = {name: _operation(each) for name, each in fields["ops"].items()}
    return Path(**{**fields, "ops": ops})


def _operation(fields: Mapping[str, Any]) -> Operation:
    # JSON has no numbers as keys.
    times = {
        name: {int(end_ns): count for end_ns, count in fields[name].items()}
        for name in ("latency", "took")
    }
    return Operation(**{**fields, **times})
