"""vLLM's tiers side by side: ours and its own `fs` (O_DIRECT), on the same jobs, in one process.

    .hosts/vllm/bin/python bench/hosts/vllm.py --dir DIR [--dir DIR] [--fast-drive] [--json FILE]

Needs vLLM (tests/integrations/vllm/install.sh), and --fast-drive root. Every round stores and loads
the same blocks by each tier, in turn, and every other round in reverse. A job is timed from its
submission until the tier says that it has ended. Blocks loaded are compared with what was stored.
Then, for each tier, how long the scheduler is held up by one call while 1,000 jobs wait.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import mmap
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

# This file would be taken for vLLM.
sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import fast_drive
import machine
import record
import side_by_side
from spdk_kv.units import GIB, KIB, MIB, format_nbytes, parse_nbytes

OURS, THEIRS = "spdk_kv", "fs"
FASTER = record.Target("at least", 1.3)
CALL = record.Target("at most", 100)
WAITING_JOBS = 1000
CALLS = 4000


@dataclass(frozen=True)
class Run:
    """One direction of one round of one tier."""

    gib_s: float
    cpu_s_per_gib: float
    p99_ms: float


class Bed:
    """A CPU cache of vLLM's of so many rows, and tiers beside it."""

    def __init__(
        self, folder: Path, rows: int, row_nbytes: int, capacity: int, options: dict[str, Any]
    ) -> None:
        self.memory = mmap.mmap(-1, rows * row_nbytes)
        self.rows = np.frombuffer(self.memory, np.int8).reshape(rows, row_nbytes)
        self._folder = folder
        self._options = {"capacity": capacity, "most_waiting": 1 << 50, "patience_s": 1e9}
        self._options |= options
        self._request = SimpleNamespace(req_id="bench")
        self._ids = itertools.count()
        words = np.frombuffer(self.memory, np.uint64)
        words[:] = np.random.default_rng(0).integers(0, 1 << 63, len(words), np.uint64)

    def _spec(self) -> Any:
        from vllm.v1.kv_offload import config as vllm

        config = vllm.OffloadingConfig(
            groups=(vllm.OffloadingGroupConfig(16, ("layers.0",), 0),),
            worker_kv_bytes_per_block=self.rows.shape[1],
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="bench",
            model=vllm.OffloadingModelConfig("bench", "bfloat16"),
            cache=vllm.OffloadingCacheConfig(16, 1),
            parallel=vllm.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        )
        return SimpleNamespace(config=config, blocks_per_chunk=1)

    @contextmanager
    def tier(self, name: str) -> Iterator[Any]:
        """A tier on an empty folder, which is removed afterwards."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        view = memoryview(self.rows)
        if name == OURS:
            from spdk_kv.integrations.vllm import SpdkKvTier

            made = SpdkKvTier(
                self._spec(),
                view,
                "SpdkKvTier",
                location=f"file://{folder}",
                identity="bench",
                **self._options,
            )
        else:
            from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

            made = FileSystemTierManager(self._spec(), view, "fs", root_dir=str(folder))
            assert made._use_o_direct, f"no O_DIRECT on {folder}"
        try:
            yield made
        finally:
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)

    def job(self, keys: list[bytes], first: int, is_load: bool) -> Any:
        """A job of vLLM's for the rows from ``first`` on."""
        from vllm.v1.kv_offload.tiering.base import TransferJob

        rows = (np.arange(first, first + len(keys)) % len(self.rows)).astype(np.int32)
        return TransferJob(next(self._ids), keys, rows, is_load, self._request)

    def run(self, tier: Any, keys: list[list[bytes]], in_flight: int, is_load: bool) -> Run:
        """All jobs, at most so many at a time."""
        begun: dict[int, float] = {}
        took = []
        jobs = deque(self.job(job, number * len(job), is_load) for number, job in enumerate(keys))
        submit = tier.submit_load if is_load else tier.submit_store
        start, cpu = time.perf_counter(), time.process_time()
        while jobs or begun:
            while jobs and len(begun) < in_flight:
                job = jobs.popleft()
                begun[job.job_id] = time.perf_counter()
                submit(job)
            for result in tier.get_finished_jobs():
                assert result.success, f"job {result.job_id} failed"
                took.append(time.perf_counter() - begun.pop(result.job_id))
            # vLLM looks once a step of the model.
            time.sleep(0.0005)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        gib = sum(map(len, keys)) * self.rows.shape[1] / GIB
        return Run(gib / seconds, cpu / gib, float(np.percentile(took, 99)) * 1e3)


def measure(
    folder: Path, row_nbytes: int, words: argparse.Namespace
) -> dict[tuple[str, str], list[Run]]:
    """Rounds of stores and loads by both tiers; by tier and direction."""
    rounds, per_job = words.rounds, words.per_job
    count = words.total // row_nbytes
    bed = Bed(folder, count, row_nbytes, 2 * words.total, words.ours)
    expected = bed.rows.copy()
    runs: dict[tuple[str, str], list[Run]] = {}
    for number in range(rounds):
        names = (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS)
        random = np.random.default_rng(number)
        keys = [[random.bytes(36) for _ in range(per_job)] for _ in range(count // per_job)]
        for name in names:
            with bed.tier(name) as tier:
                _say(f"{format_nbytes(row_nbytes)}, round {number + 1} of {rounds}: {name}")
                runs.setdefault((name, "store"), []).append(
                    bed.run(tier, keys, words.in_flight, False)
                )
                os.sync()
                bed.rows[:] = 0
                runs.setdefault((name, "load"), []).append(
                    bed.run(tier, keys, words.in_flight, True)
                )
                assert np.array_equal(bed.rows, expected), f"{name} loaded other bytes"
    return runs


def measure_calls(
    folder: Path, words: argparse.Namespace, row_nbytes: int = 64 * KIB
) -> dict[str, dict[str, list[float]]]:
    """Microseconds of each call while 1,000 jobs wait; by tier and call."""
    bed = Bed(folder, 4096, row_nbytes, 2 * GIB, words.ours)
    found: dict[str, dict[str, list[float]]] = {}
    for name in (OURS, THEIRS):
        _say(f"calls with {WAITING_JOBS} jobs waiting: {name}")
        with bed.tier(name) as tier:
            found[name] = _calls(bed, tier)
    return found


def _calls(bed: Bed, tier: Any) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any], *given: Any) -> Any:
        begun = time.perf_counter()
        result = call(*given)
        took.setdefault(name, []).append((time.perf_counter() - begun) * 1e6)
        return result

    random = np.random.default_rng(7)
    stored = [[random.bytes(36)] for _ in range(512)]
    bed.run(tier, stored, 64, False)
    waiting, number = 0, 0
    while number < CALLS:
        while waiting < WAITING_JOBS:
            keys, is_load = stored[number % len(stored)], bool(number % 2)
            if not is_load:
                keys = [random.bytes(36)]
            job = bed.job(keys, number % len(bed.rows), is_load)
            submit = tier.submit_load if is_load else tier.submit_store
            # What fills the queue at first is not measured.
            full = number >= WAITING_JOBS
            if full:
                timed("submit_load" if is_load else "submit_store", submit, job)
            else:
                submit(job)
            waiting += 1
            number += 1
        timed("lookup", tier.lookup, stored[number % len(stored)][0], bed._request)
        waiting -= len(list(timed("get_finished_jobs", tier.get_finished_jobs)))
    while waiting:
        waiting -= len(list(tier.get_finished_jobs()))
        time.sleep(0.001)
    return took


def sides(runs: dict[str, dict[tuple[str, str], list[Run]]]) -> list[record.Side]:
    """What each tier did, by block and direction."""
    return [
        record.Side(
            f"{direction} of {size}",
            name,
            [
                record.figure("speed", [run.gib_s for run in found[name, direction]], "GiB/s"),
                record.figure(
                    "CPU", [run.cpu_s_per_gib for run in found[name, direction]], "s/GiB"
                ),
                record.figure("p99 of a job", [run.p99_ms for run in found[name, direction]], "ms"),
            ],
        )
        for size, found in runs.items()
        for direction in ("store", "load")
        for name in (OURS, THEIRS)
    ]


def tables(
    runs: dict[str, dict[tuple[str, str], list[Run]]],
    calls: dict[str, dict[str, list[float]]],
) -> tuple[list[str], list[record.Figure]]:
    """What is printed besides, and the figures with their targets."""
    lines = []
    figures = []
    for size, found in runs.items():
        for direction in ("store", "load"):
            ours, theirs = found[OURS, direction], found[THEIRS, direction]
            pairs = list(zip(ours, theirs, strict=True))
            what = f"{direction} of {size}, over vLLM's fs"
            ratios = [a.gib_s / b.gib_s for a, b in pairs]
            figures.append(record.figure(f"{what}: bytes per second", ratios, "times", FASTER))
            ratios = [a.cpu_s_per_gib / b.cpu_s_per_gib for a, b in pairs]
            figures.append(record.figure(f"{what}: CPU time", ratios, "times"))
            ratios = [a.p99_ms / b.p99_ms for a, b in pairs]
            figures.append(record.figure(f"{what}: p99 of a job", ratios, "times"))
    lines += ["| call | tier | median, us | p99, us |", "|---|---|---|---|"]
    for name, by_call in calls.items():
        for call, took in sorted(by_call.items()):
            p99 = float(np.percentile(took, 99))
            lines.append(f"| {call} | {name} | {median(took):.1f} | {p99:.1f} |")
            target = CALL if name == OURS else None
            what = f"{name}: p99 of {call} with {WAITING_JOBS} jobs waiting"
            figures.append(record.figure(what, [p99], "us", target))
    lines += ["", "| figure | median (min to max) | target | |", "|---|---|---|---|"]
    for one in figures:
        spread = "" if one.low is None else f" ({one.low:.2f} to {one.high:.2f})"
        lines.append(f"| {one.what} | {one.value:.2f}{spread} | {one.wanted} | {one.verdict} |")
    return lines, figures


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, action="append", default=[], help="a folder to work in")
    parser.add_argument("--fast-drive", action="store_true", help="a simulated drive as well")
    parser.add_argument("--block", action="append", help="bytes of a block (256 KiB and 1 MiB)")
    parser.add_argument("--per-job", type=int, default=16, help="blocks of a job")
    parser.add_argument("--in-flight", type=int, default=8, help="jobs at a time")
    parser.add_argument("--total", type=parse_nbytes, default=512 * MIB, help="bytes of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--ours", type=json.loads, default={}, metavar="JSON", help="options of our tier"
    )
    parser.add_argument("--no-calls", action="store_true", help="bytes per second only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
    words = parser.parse_args()
    if not (words.dir or words.fast_drive):
        parser.error("nothing to do: --dir or --fast-drive")
    return words


def main() -> None:
    words = _arguments()
    logging.disable(logging.WARNING)
    records = []
    with ExitStack() as undo:
        folders = [folder.resolve() for folder in words.dir]
        if words.fast_drive:
            folders.append(undo.enter_context(fast_drive.fast_drive(4 * GIB)))
        for parent in folders:
            folder = parent / f"spdk_kv-bench-{os.getpid()}"
            folder.mkdir(parents=True)
            undo.callback(shutil.rmtree, folder, True)
            from vllm import __version__

            about = machine.describe(parent, f"vLLM {__version__}")
            runs = {}
            for text in words.block or ("256 KiB", "1 MiB"):
                row_nbytes = parse_nbytes(text)
                runs[text] = measure(folder, row_nbytes, words)
            calls = {} if words.no_calls else measure_calls(folder, words)
            _say("")
            lines, figures = tables(runs, calls)
            compared = sides(runs)
            print("\n".join([*about, "", *side_by_side.table(compared), "", *lines, ""]))
            method = (
                f"{words.rounds} rounds of {format_nbytes(words.total)}, {words.per_job} blocks a "
                f"job, {words.in_flight} jobs at a time; checksums verified in ours"
            )
            flat = {
                f"{size}, {name}, {direction}": [vars(run) for run in seen]
                for size, found in runs.items()
                for (name, direction), seen in found.items()
            }
            label = machine.label(parent)
            records.append(record.today("host_vllm", label, about, method, figures, flat, compared))
    if words.json:
        record.write(words.json, records)


if __name__ == "__main__":
    main()
