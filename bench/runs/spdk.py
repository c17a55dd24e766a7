"""Every run that against_spdk_perf.py makes: the engine's, the store's and perf's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import record
import spdk_kv
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location
from spdk_kv.measure import Workload, filled_memory, measure
from spdk_kv.units import GIB, KIB, MIB
from spdk_perf import SimulatedDrive

DRIVE_NBYTES = GIB
TENSOR_NBYTES = 64 * MIB
DEPTH = 16
RANDOM_DEPTH = 32
RANDOM_SEGMENTS = 20_000
SMALL = 4 * KIB
SMALL_ROWS = "4 KiB at random"
"""What the rows of the engine's small commands have in their labels."""
# A PCIe 3.0 drive. The simulated one is bound by nothing but memory, which on a slow machine is no
# faster than a PCIe 4.0 drive.
LIMIT_MIB_S = 3072


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit`` of the row; CPU-seconds per GiB, polling included, where it says
    something."""

    value: float
    cpu_s_per_gib: float | None = None


@dataclass(frozen=True)
class Row:
    """One comparison. ``least``: what the ratio should reach; None: for information."""

    label: str
    unit: str
    ours: Callable[[], Figure]
    perf: Callable[[], Figure]
    least: float | None = None

    def compared(self, pairs: Sequence[tuple[Figure, Figure]]) -> record.Figure:
        """The figure of these rounds of (ours, perf's), each compared within itself."""
        target = None if self.least is None else record.Target("at least", self.least)
        ratios = [ours.value / perf.value for ours, perf in pairs]
        return record.figure(self.label, ratios, "of perf", target)


def rows(drive: SimulatedDrive, seconds: float) -> list[Row]:
    """All comparisons, in the order in which a round makes them."""
    found = []
    for op in ("read", "write"):
        for size, name in ((128 * KIB, "128 KiB"), (MIB, "1 MiB")):
            found.append(
                Row(
                    f"engine, {op} {name} x {DEPTH}",
                    "GiB/s",
                    lambda op=op, size=size: _engine(drive, op, size, seconds),
                    lambda op=op, size=size: _perf(drive, op, size, seconds),
                    0.97,
                )
            )
    found.append(
        Row(
            f"engine, 4 KiB at random x {RANDOM_DEPTH}, one transfer",
            "IOPS",
            lambda: _one_transfer(drive, seconds),
            lambda: _perf_random(drive, seconds),
            0.95,
        )
    )
    found.append(
        Row(
            f"engine, 4 KiB at random x {RANDOM_DEPTH}, steady",
            "IOPS",
            lambda: _steady(drive, seconds),
            lambda: _perf_random(drive, seconds),
            0.95,
        )
    )
    for verb, verify, least in (
        ("get", True, 0.93),
        ("put", True, 0.93),
        ("get", False, None),
        ("put", False, None),
        ("put from its memory", True, None),
    ):
        op = verb.split()[0].replace("get", "read").replace("put", "write")
        label = f"store.{verb}, 64 MiB{'' if verify else ', no checksum'}"
        found.append(
            Row(
                label,
                "GiB/s",
                lambda verb=verb, verify=verify: _store(drive, verb, verify, seconds),
                lambda op=op: _perf(drive, op, MIB, seconds),
                least,
            )
        )
        # perf moves the same 16 MiB again and again, which stay in the processor's cache. With as
        # many buffers as a tensor has MiB, it uses as much memory as a store does.
        found.append(
            Row(
                f"{label}; perf with 64 MiB of buffers",
                "GiB/s",
                lambda verb=verb, verify=verify: _store(drive, verb, verify, seconds),
                lambda op=op: _perf(drive, op, MIB, seconds, TENSOR_NBYTES // MIB),
            )
        )
    for verb, op in (("get", "read"), ("put", "write"), ("put from its memory", "write")):
        found.append(
            Row(
                f"store.{verb}, 64 MiB; drive limited to {LIMIT_MIB_S / KIB:g} GiB/s",
                "GiB/s",
                lambda verb=verb: _limited(drive, lambda: _store(drive, verb, True, seconds)),
                lambda op=op: _limited(drive, lambda: _perf(drive, op, MIB, seconds)),
                0.93,
            )
        )
    for quantile in (50, 99):
        found.append(
            Row(
                f"store.get, 4 KiB x 1, p{quantile}",
                "us",
                lambda quantile=quantile: _small_gets(drive, quantile, seconds),
                lambda quantile=quantile: _perf_latency(drive, quantile, seconds),
            )
        )
    return found


def _limited(drive: SimulatedDrive, run: Callable[[], Figure]) -> Figure:
    drive.limit(LIMIT_MIB_S)
    try:
        return run()
    finally:
        drive.limit(0)


def _perf(drive: SimulatedDrive, op: str, size: int, seconds: float, depth: int = DEPTH) -> Figure:
    seen = drive.perf(op, size, depth, seconds)
    return Figure(seen.gib_s, 1 / seen.gib_s)


def _perf_random(drive: SimulatedDrive, seconds: float) -> Figure:
    return Figure(drive.perf("randread", SMALL, RANDOM_DEPTH, seconds).iops)


def _perf_latency(drive: SimulatedDrive, quantile: int, seconds: float) -> Figure:
    seen = drive.perf("randread", SMALL, 1, seconds)
    return Figure(seen.p50_us if quantile == 50 else seen.p99_us)


def _open(drive: SimulatedDrive, size: int, depth: int) -> Engine:
    return open_engine(parse_location(drive.uri), options=QueueOptions(depth, size))


def _engine(drive: SimulatedDrive, op: str, size: int, seconds: float) -> Figure:
    engine = _open(drive, size, DEPTH)
    try:
        seen = measure(engine, Workload(op, size, DRIVE_NBYTES), seconds)
    finally:
        engine.close()
    return Figure(seen.gib_s, seen.cpu_s_per_gib)


def _steady(drive: SimulatedDrive, seconds: float) -> Figure:
    """A stream of segments, as perf's is."""
    engine = _open(drive, SMALL, RANDOM_DEPTH)
    try:
        return Figure(measure(engine, Workload("randread", SMALL, DRIVE_NBYTES), seconds).iops)
    finally:
        engine.close()


def _one_transfer(drive: SimulatedDrive, seconds: float) -> Figure:
    """Transfers of many random segments, one at a time: each fills the queue and drains it."""
    engine = _open(drive, SMALL, RANDOM_DEPTH)
    try:
        memory = filled_memory(engine, RANDOM_DEPTH * SMALL)
        slots = np.arange(RANDOM_SEGMENTS, dtype=np.uint64) % np.uint64(RANDOM_DEPTH)
        addresses = np.uint64(memory.address) + slots * np.uint64(SMALL)
        sizes = np.full(RANDOM_SEGMENTS, SMALL, dtype=np.uint64)
        random = np.random.default_rng(1)
        count = 0
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            offsets = random.integers(0, DRIVE_NBYTES // SMALL, RANDOM_SEGMENTS, dtype=np.uint64)
            transfer = engine.transfer(READ)
            transfer.keep(memory)
            transfer.add_many(offsets * np.uint64(SMALL), addresses, sizes)
            engine.run(transfer)
            count += RANDOM_SEGMENTS
    finally:
        engine.close()
    return Figure(count / elapsed)


def _opened_store(drive: SimulatedDrive, folder: str) -> spdk_kv.KVStore:
    """A new store, whatever was on the drive."""
    _wipe(drive)
    engine = spdk_kv.EngineOptions(staging="256 MiB")
    return spdk_kv.open(
        drive.uri, create=True, engine=engine, index_dir=folder, flush_interval_s=None
    )


def _store(drive: SimulatedDrive, verb: str, verify: bool, seconds: float) -> Figure:
    """Tensors in turn; replaced ones free their extents with a commit, which is timed as well.

    ``verb``: get, put (from a tensor in ordinary memory, which the drive does not reach) or "put
    from its memory" (from a tensor that was got, and lies where the drive reaches it).
    """
    tensor = torch.randint(0, 256, (TENSOR_NBYTES,), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, _opened_store(drive, folder) as store:
        store.verify = verify
        keys = [f"tensor-{number}" for number in range(6)]
        for key in keys:
            store.put(key, tensor)
        if verb == "put from its memory":
            tensor = store.get("tensor-0")
            keys = keys[1:]
        nbytes = 0
        cpu, began = time.process_time(), time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            key = keys[nbytes // TENSOR_NBYTES % len(keys)]
            if verb == "get":
                store.get(key)
            else:
                store.put(key, tensor)
            nbytes += TENSOR_NBYTES
        cpu = time.process_time() - cpu
        return Figure(nbytes / GIB / elapsed, cpu / (nbytes / GIB))


def _small_gets(drive: SimulatedDrive, quantile: int, seconds: float) -> Figure:
    with tempfile.TemporaryDirectory() as folder, _opened_store(drive, folder) as store:
        out = torch.zeros(SMALL, dtype=torch.uint8)
        for number in range(1000):
            store.put(f"small-{number}", out)
        times = []
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            store.get(f"small-{len(times) * 7 % 1000}", out=out)
            times.append(time.perf_counter() - began)
        return Figure(float(np.percentile(times, quantile)) * 1e6)


def fill(drive: SimulatedDrive) -> None:
    """Writes the whole drive once. What was never written takes no memory: the kernel answers
    reads of it with one page of zeros, which is always in a cache, after a fault per page."""
    engine = _open(drive, MIB, DEPTH)
    try:
        memory = filled_memory(engine, MIB)
        transfer = engine.transfer(WRITE)
        transfer.keep(memory)
        for offset in range(0, DRIVE_NBYTES, MIB):
            transfer.add(offset, memory.address, MIB)
        engine.run(transfer)
    finally:
        engine.close()


def _wipe(drive: SimulatedDrive) -> None:
    """Blanks both ends of the drive: a new store is made on blank drives only."""
    engine = _open(drive, MIB, DEPTH)
    try:
        zeros = engine.allocate(MIB)
        for offset in (0, DRIVE_NBYTES - MIB):
            transfer = engine.transfer(WRITE)
            transfer.keep(zeros)
            transfer.add(offset, zeros.address, MIB)
            engine.run(transfer)
    finally:
        engine.close()
