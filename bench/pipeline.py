"""Storage I/O overlapped with the copy to a GPU: what is reached of the slower of drive and link.

    python bench/pipeline.py --dir DIR          on the drive under DIR
    python bench/pipeline.py --fast-drive       on a simulated drive (needs root)

Either or both; --quick for a look, --json FILE keeps every single figure. The link is a GPU's where
torch finds one, and emulated otherwise: several times as fast as the drive's best in the same
process, or slower (--ratios). --still: emulated copies take their time and move nothing, since a
GPU's copies cost the processor no time. A round is made of short slices, in each of which all have
their turn: the drive alone in each of four chunk sizes, at the same depth and without a pause, and
each way. So what changes from one second to the next (a simulated drive's speed does, by half)
changes them alike. The yardstick is the size that was the drive's best over the round; ratios are
taken within the round. "Drive busy" is the part of the time with a command in flight: where it is
near 1, a pipeline that stays behind lost nothing at the ends of tensors; the drive was slower.

Ways: serial reads a tensor whole, then copies it in one; fixed overlaps chunks of one size;
adaptive picks size and depth itself, after a warm-up. Tensors go one at a time, so that drive and
link overlap within a tensor only, and each fills the queue and drains it again; or two at once
("across"), so that the end of one overlaps with the beginning of the next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fast_drive
import machine
from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location
from spdk_kv.link import Pipeline, link_for, stream_of
from spdk_kv.measure import Load, fill, filled_memory, measure
from spdk_kv.units import GIB, KIB, MIB, format_nbytes, parse_nbytes

OPS = {"read": READ, "write": WRITE}
SEGMENT = MIB
DEPTH = 16
TARGET = 0.95
CHUNKS = (128 * KIB, 256 * KIB, 512 * KIB, MIB)
# Seconds of one slice, about.
SLICE_S = 0.1
# Seconds of every adaptive way before its first round: it learns in them.
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
        # Where two tensors live on the "GPU", and one on the way for the serial one.
        self.stream: int | None = None
        if link.name == "cuda":
            self.device = [torch.ones(self.nbytes, dtype=torch.uint8, device="cuda") for _ in "12"]
            self.addresses = [tensor.data_ptr() for tensor in self.device]
            self.stream = stream_of("cuda")
        else:
            self.device = [_ordinary(self.nbytes) for _ in "12"]
            self.addresses = [region.address for region in self.device]
        self.host = filled_memory(engine, self.nbytes)
        self.registered = link.register(self.host)
        self.pipelines = {
            f"fixed, {chunk // KIB} KiB": Pipeline(engine, link, "fixed", chunk_nbytes=chunk)
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
                    # As a lone get does it: whoever waits drives the queue.
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
            self.device[0].copy_(host, non_blocking=True)
        else:
            host.copy_(self.device[0], non_blocking=True)
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
    seen = measure(engine, Load(op, chunk, size), seconds)
    return Figure(seen.nbytes, seen.elapsed_s, seen.cpu_s_per_gib * seen.nbytes / GIB)


def measure_drive(folder: Path, words: argparse.Namespace) -> dict[str, Any]:
    """Every figure, by direction and link."""
    path = folder / "pipeline.data"
    found: dict[str, Any] = {}
    with ExitStack() as undo:
        undo.callback(path.unlink, missing_ok=True)
        options = QueueOptions(segment_nbytes=SEGMENT, depth=DEPTH)
        location = parse_location(f"file://{folder}")
        engine = open_engine(location, str(path), engine=words.engine, options=options)
        undo.callback(engine.close)
        engine.ensure(words.size)
        fill(engine, words.size)
        for op in words.ops:
            best = max(
                drive_alone(engine, op, chunk, words.size, words.seconds).gib_s for chunk in CHUNKS
            )
            for name, link, link_gib_s in links(best, op, words):
                label = f"{op}, {name}"
                found[label] = measure_link(Bench(engine, op, link, link_gib_s, words), words)
                print(*table(label, found[label]), "", sep="\n", flush=True)
    return found


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
    """Of every way, and of the drive alone (``drive``), what it did over all slices."""
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


def table(label: str, found: dict[str, Any]) -> list[str]:
    rounds = found["rounds"]
    drive = _spread([one["drive"]["gib_s"] for one in rounds], 2)
    alone = {
        chunk // KIB: statistics.median(one["alone_gib_s"][chunk] for one in rounds)
        for chunk in CHUNKS
    }
    by_size = ", ".join(f"{gib_s:.2f} in {kib} KiB" for kib, gib_s in alone.items())
    lines = [
        f"### {label}",
        "",
        f"Drive alone: {drive} GiB/s ({by_size}); link: {found['link_gib_s']:.2f} GiB/s.",
        "",
        "| way | GiB/s, median (min to max) | of the slower of the two | drive busy "
        "| CPU-s per GiB | |",
        "|---|---|---|---|---|---|",
    ]
    for way in found["ways"]:
        reached = [one[way]["reached"] for one in rounds]
        verdict = ""
        if way.startswith("adaptive"):
            verdict = "met" if statistics.median(reached) >= TARGET else "missed"
        cells = (
            way,
            _spread([one[way]["gib_s"] for one in rounds], 2),
            _spread(reached, 3),
            f"{statistics.median(one[way]['drive_busy'] for one in rounds):.2f}",
            f"{statistics.median(one[way]['cpu_s_per_gib'] for one in rounds):.3f}",
            verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    chosen = found["adaptive"]
    for op in OPS:
        if op in chosen:
            lines += [
                "",
                f"Adaptive chose {chosen[op]['reason']}; overlap {chosen['overlap']:.2f} of the "
                "shorter time, all ways together.",
            ]
    return lines


def _spread(values: list[float], digits: int) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, action="append", default=[], help="a folder to work in")
    parser.add_argument("--fast-drive", action="store_true", help="a simulated drive as well")
    parser.add_argument("--engine", help="uring, threads or pagecache; the best without")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[0.6, 2.3, 3.8],
        help="emulated links, in multiples of the drive's best",
    )  # fmt: skip
    parser.add_argument("--latency", type=float, default=5.0, help="of each copy, in us")
    parser.add_argument("--still", action="store_true", help="emulated copies move nothing")
    parser.add_argument("--size", type=parse_nbytes, default=GIB, help="bytes of the data file")
    parser.add_argument("--tensor", type=parse_nbytes, default=64 * MIB, help="bytes of a tensor")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="length of a way's part of a round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short runs, two rounds: a look only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure there")
    words = parser.parse_args()
    if words.quick:
        words.seconds, words.rounds = 0.2, 2
    if not (words.dir or words.fast_drive):
        parser.error("nothing to do: --dir or --fast-drive")
    if words.tensor % MIB or not 0 < words.tensor <= words.size or words.size % words.tensor:
        parser.error("--tensor is a multiple of 1 MiB, and --size one of --tensor")
    return words


def main() -> None:
    words = _arguments()
    kept: dict[str, Any] = {}
    with ExitStack() as undo:
        folders = [folder.resolve() for folder in words.dir]
        if words.fast_drive:
            folders.append(undo.enter_context(fast_drive.fast_drive(words.size + GIB)))
        for folder in folders:
            lines = machine.describe(folder)
            print(f"\n## {machine.drive(folder)}\n")
            print(*(f"- {line}" for line in lines), sep="\n")
            copies = "copies move nothing" if words.still else "copies move their bytes"
            print(
                f"- method: {words.rounds} rounds of {words.seconds:g} s per run, tensors of "
                f"{format_nbytes(words.tensor)}, emulated {copies}, "
                f"{words.latency:g} us more for each\n"
            )
            kept[str(folder)] = {"machine": lines, "found": measure_drive(folder, words)}
    if words.json:
        words.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
