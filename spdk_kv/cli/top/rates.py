"""What a store did between two samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spdk_kv.metrics import OPERATIONS, Operation, Path, Reading, share_below

# Beyond the next look of the owner: if nothing is told until then, it did nothing.
_PATIENCE_S = 1.5


@dataclass(frozen=True)
class OperationRates:
    """Per second; ``p50_s`` and ``p99_s`` of transfers, None where there were none."""

    path: str
    op: str
    nbytes: float
    transfers: float
    ios: float
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True)
class Rates:
    """What was done per second. ``depth``: commands in flight by path, while there were any.
    ``cpu`` and ``engine_cpu``: of one processor; None where that is not known. ``sequences``:
    name -> (read, written) bytes."""

    held: Mapping[str, float]
    operations: tuple[OperationRates, ...]
    depth: Mapping[str, float]
    cpu: float | None
    engine_cpu: float | None
    sequences: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def nbytes(self) -> float:
        """Bytes moved."""
        return sum(each.nbytes for each in self.operations)


class Difference:
    """Two readings of one store in a row, and what lies between them."""

    def __init__(self) -> None:
        self._before: Reading | None = None
        self.now: Reading | None = None

    def add(self, reading: Reading | None) -> None:
        """Takes the next one; None, or another process than before, begins anew."""
        last = self.now
        if reading is None:
            self._before = self.now = None
        elif last is None or not _follows(last, reading):
            self._before, self.now = None, reading
        elif reading.number > last.number:
            self._before, self.now = last, reading
        else:
            self.now = reading  # the same, older

    @property
    def is_idle(self) -> bool:
        """Whether the owner looked again, and nothing had happened."""
        return self.now is not None and self.now.age_s > self.now.wait_s + _PATIENCE_S

    def rates(self) -> Rates | None:
        """None where there is but one reading, and there may soon be another."""
        if self.now is None:
            return None
        before = self._before
        if not self.is_idle:
            if before is None:
                return None
            return rates_between(before, self.now, _seconds(before, self.now))
        # The store is, its process may be busy: the last two samples say so.
        nothing = replace(rates_between(self.now, self.now, 1.0), cpu=None, engine_cpu=None)
        if before is None:
            return nothing
        last = rates_between(before, self.now, _seconds(before, self.now))
        return replace(nothing, cpu=last.cpu, engine_cpu=last.engine_cpu)


def _follows(before: Reading, now: Reading) -> bool:
    same = (before.pid, before.sample.opened_s) == (now.pid, now.sample.opened_s)
    return same and now.number >= before.number


def _seconds(before: Reading, now: Reading) -> float:
    """Until the look before this one nothing had changed, if this writing is the next one."""
    since = before.sample.clock_s
    if now.number == before.number + 1 and now.looked_s is not None:
        since = max(since, now.looked_s)
    return max(1e-3, now.sample.clock_s - since)


def rates_between(before: Reading, now: Reading, seconds: float) -> Rates:
    """What was done from ``before`` to ``now``, in ``seconds``."""
    one, other = before.sample, now.sample
    operations: list[OperationRates] = []
    depth: dict[str, float] = {}
    engine_cpu_ns = 0
    # CPU time is also spent where nothing is done with the store.
    apart_s = max(1e-3, other.clock_s - one.clock_s)
    for name, path in other.paths.items():
        former = one.paths.get(name)
        if former is None:
            continue
        operations += [
            _operation(name, op, former.ops[op], path.ops[op], seconds) for op in OPERATIONS
        ]
        depth[name] = _depth(former, path)
        engine_cpu_ns += path.cpu_ns - former.cpu_ns
    return Rates(
        held={
            name: (value - one.held.get(name, value)) / seconds
            for name, value in other.held.items()
        },
        operations=tuple(operations),
        depth=depth,
        cpu=(other.cpu_ns - one.cpu_ns) / 1e9 / apart_s,
        engine_cpu=engine_cpu_ns / 1e9 / apart_s,
        sequences=_sequences(one.sequences, other.sequences, seconds),
    )


def _operation(
    path: str, op: str, before: Operation, now: Operation, seconds: float
) -> OperationRates:
    took = Counter(now.took)
    took.subtract(before.took)
    return OperationRates(
        path=path,
        op=op,
        nbytes=(now.nbytes - before.nbytes) / seconds,
        transfers=(now.transfers - before.transfers) / seconds,
        ios=(now.ios - before.ios) / seconds,
        p50_s=share_below(+took, 0.5),
        p99_s=share_below(+took, 0.99),
    )


def _depth(before: Path, now: Path) -> float:
    in_flight_ns = sum(now.ops[op].latency_ns - before.ops[op].latency_ns for op in OPERATIONS)
    return in_flight_ns / max(1, now.busy_ns - before.busy_ns)


def _sequences(
    before: tuple[Mapping[str, Any], ...], now: tuple[Mapping[str, Any], ...], seconds: float
) -> dict[str, tuple[float, float]]:
    former = {each["name"]: each for each in before}

    def speed(each: Mapping[str, Any], what: str) -> float:
        # One that was not among those used last is new here: what it did before is not known.
        last = former.get(each["name"], each)
        return float(max(0, each[what] - last[what]) / seconds)

    return {
        each["name"]: (speed(each, "read_nbytes"), speed(each, "written_nbytes")) for each in now
    }
