"""What pipeline.py measures: every way to move tensors between one drive and one link."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine
from spdk_kv.link import Pipeline, link_for, stream_of
from spdk_kv.measure import Workload, filled_memory, measure
from spdk_kv.units import GIB, KIB, MIB

OPS = {"read": READ, "write": WRITE}
SEGMENT = MIB
DEPTH = 16
CHUNKS = (128 * KIB, 256 * KIB, 512 * KIB, MIB)
# About how long one slice is.
SLICE_S = 0.1
# How long each adaptive way runs before its first round, so that it has learnt by then.
WARM_UP_S = 1.5


@dataclass
class Figure:
    nbytes: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    busy_s: float = 0.0  # with something in flight on the drive

    @property
    def gib_s(self) -> float:
        return self.nbytes / GIB / max(self.elapsed_s, 1e-9)

    @property
    def cpu_s_per_gib(self) -> float:
        return self.cpu_s / max(self.nbytes / GIB, 1e-9)

    def add(self, other: Figure) -> None:
        self.nbytes += other.nbytes
        self.elapsed_s += other.elapsed_s
        self.cpu_s += other.cpu_s
        self.busy_s += other.busy_s


class Bench:
    """One drive, one link, one direction: every way to move tensors of ``tensor_nbytes``."""

    def __init__(self, engine: Engine, op: str, link: Any, link_gib_s: float, words: Any) -> None:
        self.engine, self.op, self.link, self.link_gib_s = engine, op, link, link_gib_s
        self.nbytes = words.tensor
        self.places = words.size // words.tensor
        self.at = 0
        # Where two tensors live on the GPU or what emulates it, and one on its way for `serial`.
        self.stream: int | None = None
        if link.name == "cuda":
            self.gpu = [torch.ones(self.nbytes, dtype=torch.uint8, device="cuda") for _ in "12"]
            self.addresses = [tensor.data_ptr() for tensor in self.gpu]
            self.stream = stream_of("cuda")
        else:
            self.gpu = [_ordinary(self.nbytes) for _ in "12"]
            self.addresses = [region.address for region in self.gpu]
        self.host = filled_memory(engine, self.nbytes)
        self.registered = link.register(self.host)
        self.pipelines = {
            f"fixed, {chunk // KIB} KiB": Pipeline(engine, link, "fixed", segment_nbytes=chunk)
            for chunk in CHUNKS
        }
        self.pipelines["adaptive"] = Pipeline(engine, link)

    def ways(self) -> dict[str, Callable[[float], Figure]]:
        made: dict[str, Callable[[float], Figure]] = {"serial": self.serial}
        for name, pipeline in self.pipelines.items():
            made[name] = lambda seconds, one=pipeline: self.overlapped(one, 1, seconds)
        adaptive = self.pipelines["adaptive"]
        made["adaptive, checksum"] = lambda s: self.overlapped(adaptive, 1, s, checksum=True)
        for name in ("fixed, 1024 KiB", "adaptive"):
            one = self.pipelines[name]
            made[f"{name}, across"] = lambda s, one=one: self.overlapped(one, 2, s)
        return made

    def overlapped(
        self, pipeline: Pipeline, at_once: int, seconds: float, checksum: bool = False
    ) -> Figure:
        queued: deque[Any] = deque()
        turn = 0

        def work() -> int:
            nonlocal turn
            while len(queued) < at_once:
                transfer = pipeline.transfer(
                    OPS[self.op], self.nbytes, stream=self.stream, checksum=checksum
                )
                transfer.add(self._next(), self.addresses[turn % 2], self.nbytes)
                turn += 1
                if at_once == 1:
                    # As a single get does it: whoever waits drives the queue.
                    self.engine.run(transfer)
                    return self.nbytes
                transfer.submit()
                queued.append(transfer)
            self.engine.wait(queued.popleft())
            return self.nbytes

        def finish() -> int:
            # Most of it is done already: it counts, with what it takes to its end.
            nbytes = len(queued) * self.nbytes
            while queued:
                self.engine.wait(queued.popleft())
            return nbytes

        return _timed(self.engine, work, seconds, finish)

    def serial(self, seconds: float) -> Figure:
        def work() -> int:
            if self.op == "write":
                self._copy()
            transfer = self.engine.transfer(OPS[self.op])
            transfer.add(self._next(), self.host.address, self.nbytes)
            self.engine.run(transfer)
            if self.op == "read":
                self._copy()
            return self.nbytes

        return _timed(self.engine, work, seconds)

    def _copy(self) -> None:
        """The whole tensor, at once."""
        to_device = self.op == "read"
        if self.stream is None:
            ends = (self.addresses[0], self.host.address)
            self.link.copy(*(ends if to_device else ends[::-1]), self.nbytes, to_device=to_device)
            return
        host = torch.frombuffer(memoryview(self.host)[: self.nbytes], dtype=torch.uint8)
        if to_device:
            self.gpu[0].copy_(host, non_blocking=True)
        else:
            host.copy_(self.gpu[0], non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def _next(self) -> int:
        self.at = (self.at + 1) % self.places
        return int(self.at * self.nbytes)


def _ordinary(nbytes: int) -> Region:
    """Memory whose pages are there before anything is timed."""
    region = Region(nbytes)
    torch.frombuffer(memoryview(region), dtype=torch.uint8).fill_(1)
    return region


def _timed(
    engine: Engine,
    work: Callable[[], int],
    seconds: float,
    finish: Callable[[], int] = lambda: 0,
) -> Figure:
    nbytes = 0
    busy_ns = engine.stats()["busy_ns"]
    cpu = time.process_time()
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not nbytes:
        nbytes += work()
    nbytes += finish()
    elapsed = time.perf_counter() - began
    busy_s = (engine.stats()["busy_ns"] - busy_ns) / 1e9
    return Figure(nbytes, elapsed, time.process_time() - cpu, busy_s)


def drive_alone(engine: Engine, op: str, chunk: int, size: int, seconds: float) -> Figure:
    """The drive without a pause, in commands of ``chunk`` bytes."""
    seen = measure(engine, Workload(op, chunk, size), seconds)
    return Figure(seen.nbytes, seen.elapsed_s, seen.cpu_s_per_gib * seen.nbytes / GIB)


def links(best: float, op: str, words: argparse.Namespace) -> list[tuple[str, Any, float]]:
    """(name, link, GiB/s) of every link that is measured with a drive of ``best`` GiB/s."""
    made: list[tuple[str, Any, float]] = []
    gpu, _ = link_for("cuda") if torch.cuda.is_available() else (None, "")
    if gpu is not None:
        gib_s = 4 * MIB / GIB / gpu.copy_time_s(4 * MIB, op == "read")
        made.append((f"GPU {gpu.device_name}, {gib_s:.1f} GiB/s", gpu, gib_s))
    for ratio in words.ratios:
        link = EmulatedLink(ratio * best * GIB, words.latency * 1e-6, moves=not words.still)
        name = f"emulated link, {ratio:g} times the drive: {ratio * best:.1f} GiB/s"
        made.append((name, link, ratio * best))
    return made


def measure_link(bench: Bench, words: argparse.Namespace) -> dict[str, Any]:
    ways = bench.ways()
    for name, way in ways.items():
        way(WARM_UP_S if name.startswith("adaptive") and not words.quick else 0.2)
    rounds = [one_round(bench, ways, words) for _ in range(words.rounds)]
    return {
        "link_gib_s": bench.link_gib_s,
        "ways": list(ways),
        "rounds": rounds,
        "adaptive": bench.pipelines["adaptive"].stats(),
    }


def one_round(
    bench: Bench, ways: dict[str, Callable[[float], Figure]], words: argparse.Namespace
) -> dict[str, Any]:
    """What every way, and the drive alone (``drive``), did over all slices."""
    slices = max(1, round(words.seconds / SLICE_S))
    alone = {
        chunk: lambda s, chunk=chunk: drive_alone(bench.engine, bench.op, chunk, words.size, s)
        for chunk in CHUNKS
    }
    everything: dict[Any, Callable[[float], Figure]] = {**alone, **ways}
    seen = {name: Figure() for name in everything}
    for number in range(slices):
        order = list(everything) if number % 2 == 0 else list(reversed(everything))
        for name in order:
            seen[name].add(everything[name](words.seconds / slices))
    chunk = max(alone, key=lambda chunk: seen[chunk].gib_s)
    bound = min(seen[chunk].gib_s, bench.link_gib_s)
    return {
        "drive": {"gib_s": seen[chunk].gib_s, "chunk_nbytes": chunk},
        "alone_gib_s": {chunk: seen[chunk].gib_s for chunk in CHUNKS},
        "bound_gib_s": bound,
        **{
            name: {
                "gib_s": seen[name].gib_s,
                "cpu_s_per_gib": seen[name].cpu_s_per_gib,
                "drive_busy": min(1.0, seen[name].busy_s / seen[name].elapsed_s),
                "reached": seen[name].gib_s / bound,
            }
            for name in ways
        },
    }
