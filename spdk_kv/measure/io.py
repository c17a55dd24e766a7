"""One engine under a steady load, for `spdk-kv bench io` and bench/.

Modelled on fio's io_uring job of the same block size and depth: as many buffers as commands in
flight, used over and over, so that both sides see the same caches.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.engines import Engine
from spdk_kv.units import GIB, MIB

OPS = {"read": READ, "write": WRITE, "randread": READ}

# With three transfers queued, the engine stays busy while Python waits for the GIL to add another.
_QUEUED_TRANSFERS = 3
# A transfer costs Python about the same however many segments it has, and on one core the queue
# stands still meanwhile. It therefore gets up to 8192 segments, unless it would then take so long
# that the clock is read too rarely; the first transfers are short, and show how long they take.
_FIRST_SEGMENTS = 1024
_MOST_SEGMENTS = 8192
_TRANSFER_NBYTES = 16 * MIB
_TRANSFER_S = 0.05

Offsets = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Workload:
    """What to ask of an engine.

    Attributes:
        op: "read", "write" or "randread".
        segment_nbytes: bytes per command.
        span_nbytes: the engine's first bytes, over which the commands go.
        checksum: compute CRC32C over every byte, as the store does.
        seed: of the random offsets.
    """

    op: str
    segment_nbytes: int
    span_nbytes: int
    checksum: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op is one of {', '.join(OPS)}, not {self.op!r}")
        if self.span_nbytes < self.segment_nbytes:
            raise ValueError(
                f"{self.span_nbytes} bytes cannot hold one segment of {self.segment_nbytes}"
            )


@dataclass(frozen=True)
class Measurement:
    """What was measured: times in seconds, latencies in microseconds (to within 6.25 %).

    Attributes:
        ios: commands completed.
        cpu_s_per_gib: CPU time of all threads of this process; the kernel's threads do not count.
        depth_achieved: commands in flight on average, while there were any.
    """

    nbytes: int
    ios: int
    elapsed_s: float
    gib_s: float
    iops: float
    cpu_s_per_gib: float
    depth_achieved: float
    lat_us_p50: float
    lat_us_p99: float
    lat_us_p999: float


def measure(
    engine: Engine, load: Workload, seconds: float, tick: Callable[[float], None] | None = None
) -> Measurement:
    """Keeps ``engine`` busy for ``seconds``, then waits for what is in flight.

    Blocks. ``tick`` is called now and then with the seconds elapsed. Raises what the engine
    raises; any exception, KeyboardInterrupt included, leaves only once nothing is in flight.
    """
    # On a hugepage, as an engine's slots are, also where so few small buffers would not be.
    memory = filled_memory(engine, max(2 * MIB, engine.depth * load.segment_nbytes))
    plan = _Plan(engine, load, memory)
    queued: deque[Transfer] = deque()
    before = engine.stats()
    cpu_before = time.process_time()
    began = time.perf_counter()
    elapsed = 0.0
    try:
        while elapsed < seconds:
            while len(queued) < _QUEUED_TRANSFERS:
                transfer = plan.transfer()
                transfer.submit()
                queued.append(transfer)
            engine.wait(queued[0])
            queued.popleft()
            before_s, elapsed = elapsed, time.perf_counter() - began
            if elapsed - before_s < _TRANSFER_S / 2:
                plan.lengthen()
            if tick is not None:
                tick(elapsed)
    finally:
        # Segments that were not submitted yet are dropped; the counters hold what was done.
        for transfer in queued:
            transfer.cancel()
        for transfer in queued:
            transfer.wait()
    elapsed = time.perf_counter() - began
    cpu_s = time.process_time() - cpu_before
    return _result(before, engine.stats(), elapsed, cpu_s)


def fill(engine: Engine, nbytes: int, advance: Callable[[int], None] | None = None) -> None:
    """Fills the first ``nbytes`` (whole blocks) with noise, and flushes them to the medium.

    Reads of space that is only allocated would not reach the drive, and zeros would flatter a drive
    that compresses. Blocks; ``advance`` is called with the bytes of each transfer.
    """
    memory = filled_memory(engine, min(nbytes, _TRANSFER_NBYTES))
    for offset in range(0, nbytes, memory.nbytes):
        transfer = engine.transfer(WRITE)
        transfer.keep(memory)
        length = min(memory.nbytes, nbytes - offset)
        transfer.add(offset, memory.address, length)
        engine.run(transfer)
        if advance is not None:
            advance(length)
    engine.flush()


def filled_memory(engine: Engine, nbytes: int) -> Any:
    """At least ``nbytes`` of the engine's own memory, filled with noise.

    Writing to it makes its pages exist before anything is timed.
    """
    memory = engine.allocate(nbytes)
    piece = np.random.default_rng(0).bytes(min(MIB, memory.nbytes))
    for at in range(0, memory.nbytes, len(piece)):
        ctypes.memmove(memory.address + at, piece, min(len(piece), memory.nbytes - at))
    return memory


class _Plan:
    """An endless supply of transfers of many segments, ready to be submitted."""

    def __init__(self, engine: Engine, load: Workload, memory: Any) -> None:
        self._engine = engine
        self._load = load
        self._memory = memory
        # Twice the depth, so that one transfer's last segments overlap the next one's first.
        self._least = 2 * engine.depth
        first = min(_FIRST_SEGMENTS, _TRANSFER_NBYTES // load.segment_nbytes)
        self._count = self._whole_rounds(first)
        self._segments = load.span_nbytes // load.segment_nbytes
        self._random = np.random.default_rng(load.seed)
        self._at = 0

    def _whole_rounds(self, count: int) -> int:
        count = min(_MOST_SEGMENTS, count)
        return max(self._least, count - count % self._engine.depth)

    def lengthen(self) -> None:
        """Doubles the segments of further transfers, up to the most allowed."""
        self._count = self._whole_rounds(2 * self._count)

    def transfer(self) -> Transfer:
        count, size = self._count, np.uint64(self._load.segment_nbytes)
        # Two commands may use one buffer when completions overtake each other. That does no harm,
        # as nobody reads their bytes.
        slots = np.arange(count, dtype=np.uint64) % np.uint64(self._engine.depth)
        transfer = self._engine.transfer(OPS[self._load.op], checksum=self._load.checksum)
        transfer.keep(self._memory)
        transfer.add_many(
            self._offsets(count) * size,
            np.uint64(self._memory.address) + slots * size,
            np.full(count, size, dtype=np.uint64),
        )
        return transfer

    def _offsets(self, count: int) -> Offsets:
        """Offsets of the next ``count`` commands, in segments."""
        if self._load.op == "randread":
            chosen = self._random.integers(0, self._segments, count, dtype=np.uint64)
        else:
            chosen = np.arange(self._at, self._at + count, dtype=np.uint64)
            chosen %= np.uint64(self._segments)
            self._at = (self._at + count) % self._segments
        return chosen


def _result(
    before: Mapping[str, Any], after: Mapping[str, Any], elapsed_s: float, cpu_s: float
) -> Measurement:
    def grown(*names: str) -> int:
        return sum(after[name] - before[name] for name in names)

    nbytes = grown("read_nbytes", "written_nbytes")
    busy_ns = grown("busy_ns")
    latencies = {
        ns: count - before["histogram"].get(ns, 0) for ns, count in after["histogram"].items()
    }
    return Measurement(
        nbytes=nbytes,
        ios=grown("ios"),
        elapsed_s=elapsed_s,
        gib_s=nbytes / GIB / elapsed_s,
        iops=grown("ios") / elapsed_s,
        cpu_s_per_gib=cpu_s / (nbytes / GIB) if nbytes else 0.0,
        depth_achieved=grown("latency_ns") / busy_ns if busy_ns else 0.0,
        lat_us_p50=_percentile(latencies, 0.5),
        lat_us_p99=_percentile(latencies, 0.99),
        lat_us_p999=_percentile(latencies, 0.999),
    )


def _percentile(latencies: Mapping[int, int], share: float) -> float:
    """A percentile in microseconds, from a histogram in nanoseconds."""
    wanted = share * sum(latencies.values())
    seen = 0
    for ns in sorted(latencies):
        seen += latencies[ns]
        if seen >= wanted:
            return ns / 1e3
    return 0.0
