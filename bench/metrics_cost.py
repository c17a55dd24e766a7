"""What counting, telling and being watched cost a store: throughput, and CPU time.

    python bench/metrics_cost.py --folder DIR [--before DIR] [--rounds N] [--json FILE]

Ways, one process each: *silent* (nothing is told), *told* (as a store is opened: once a second into
a file), *scraped* (told, and registered with prometheus-client in its process, which is scraped
every second), and *watched* (told, and `spdk-kv top` looks on). With `--before` also a version
without any of it, installed by `pip install --no-deps --target DIR`; `--after` is the same for this
one, so that both are built alike.

What they do: single gets of 4 KiB and a thousand of them in a call on ``null://``, which moves no
bytes, so that all of the time is ours; and gets of 1 MiB from a file, past the page cache. They
work in turn, a quarter of a second each, many times, in six lives: what else the machine does
changes from one second to the next by more than what is measured, and so does where the memory of a
process lies from one process to the next. Figures are totals over all rounds in proportion to
*silent*, by the clock and by CPU time of the process, with the quartiles of the rounds.

    python bench/metrics_cost.py --folder DIR --often

What is told once a second is too little to be seen that way. This tells some ninety times a second
in every other slice of the work with the file, in one process, and divides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date as calendar
from pathlib import Path
from typing import Any

import machine

WAYS = ("silent", "told", "scraped", "watched")
WORK = ("one_4k", "many_4k", "file_1m")
SLICE_S = 0.25
LIVES = 6


class Worker:
    """Does ``work`` in slices; ``beside`` once in each second of them."""

    def __init__(self, work: Callable[[], int], beside: Callable[[], None]) -> None:
        self._work, self._beside = work, beside
        self._since_beside_s = 0.0
        work()

    def slice(self) -> tuple[int, float, float]:
        """Units done, seconds by the clock, seconds of CPU time of this process."""
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < began + SLICE_S:
            done += self._work()
        self._since_beside_s += SLICE_S
        if self._since_beside_s >= 1:
            self._since_beside_s = 0.0
            self._beside()
        return done, time.perf_counter() - began, time.process_time() - cpu


def serve(way: str, folder: str) -> None:
    """Names of work come in at stdin; what a slice of it did goes out."""
    import numpy as np

    import spdk_kv

    if way == "silent":
        from spdk_kv.metrics import Publisher

        Publisher.start = lambda self: None  # type: ignore[method-assign]

    def beside_of(store: Any) -> Callable[[], None]:
        if way != "scraped":
            return lambda: None
        import prometheus_client

        registry = prometheus_client.CollectorRegistry()
        spdk_kv.metrics.register(store, registry)
        return lambda: len(prometheus_client.generate_latest(registry)) and None

    if way == "scraped":
        import spdk_kv.metrics
    place = Path(folder) / "store"
    with (
        spdk_kv.open("null://", capacity="1 GiB") as null,
        spdk_kv.open(f"file://{place}", capacity="1 GiB") as store,
    ):
        keys = [f"{number:064x}" for number in range(1000)]
        null.put_many(dict.fromkeys(keys, np.zeros(4096, np.uint8)))
        outs = [np.zeros(4096, np.uint8) for _ in keys]
        names = [str(number) for number in range(64)]
        for name in names:
            store.put(name, np.full(1 << 20, 7, np.uint8))
        store.flush()
        into = [np.zeros(1 << 20, np.uint8) for _ in names]

        def one_4k() -> int:
            for _ in range(100):
                null.get(keys[0], out=outs[0])
            return 100

        def many_4k() -> int:
            null.get_many(keys, out=outs)
            return len(keys)

        def file_1m() -> int:
            store.get_many(names, out=into)
            return len(names)

        workers = {
            "one_4k": Worker(one_4k, beside_of(null)),
            "many_4k": Worker(many_4k, beside_of(null)),
            "file_1m": Worker(file_1m, beside_of(store)),
        }
        top = None
        if way == "watched":
            # On a terminal, which `script` makes.
            command = ["script", "-qc", f"{sys.executable} -m spdk_kv top {place}", "/dev/null"]
            env = {**os.environ, "TERM": "xterm"}
            top = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
            )
            time.sleep(3)  # until it has started, which takes a processor
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(workers[line.strip()].slice()), flush=True)
        if top is not None:
            top.terminate()
            top.wait()


def started(way: str, folder: Path, installed: Path | None) -> subprocess.Popen[str]:
    place = folder / way
    place.mkdir()
    command = [sys.executable, __file__, "--way", way, "--folder", str(place)]
    env = dict(os.environ)
    if installed is not None:
        # Without site: an editable install would come first.
        command.insert(1, "-S")
        paths = [str(installed), *(path for path in sys.path if path.endswith("site-packages"))]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{way} does not start")
    return process


def asked(process: subprocess.Popen[str], work: str) -> tuple[int, float, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{work}\n")
    process.stdin.flush()
    done, clock, cpu = json.loads(process.stdout.readline())
    return done, clock, cpu


def measured(given: argparse.Namespace, ways: tuple[str, ...]) -> dict[str, Any]:
    """Of each work and way: (units, clock, CPU time) of each round."""
    found: dict[str, Any] = {work: {way: [] for way in ways} for work in WORK}
    for _ in range(LIVES):
        one_life(given, ways, found)
    return found


def one_life(given: argparse.Namespace, ways: tuple[str, ...], found: dict[str, Any]) -> None:
    """Processes of their own: where its memory lies makes one faster than another."""
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        processes = {
            way: started(way, Path(folder), given.before if way == "before" else given.after)
            for way in ways
        }
        for number in range(-(-given.rounds // LIVES)):
            for work in WORK:
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    found[work][way].append(asked(processes[way], work))
        for process in processes.values():
            process.communicate()


def figures_of(runs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for work, by_way in runs.items():
        silent = by_way["silent"]
        for way, slices in by_way.items():
            for name, at in (("per_s", 1), ("per_cpu_s", 2)):
                total = sum(each[0] for each in slices) / sum(each[at] for each in slices)
                base = sum(each[0] for each in silent) / sum(each[at] for each in silent)
                shares = [
                    (each[0] / each[at]) / (other[0] / other[at])
                    for each, other in zip(slices, silent, strict=True)
                ]
                low, middle, high = statistics.quantiles(shares, n=4)
                found[f"{work} {way} {name}"] = {
                    "total": total,
                    "of_silent": total / base,
                    "quartiles": (low, middle, high),
                }
    return found


def often(folder: Path, rounds: int) -> None:
    """Prints what telling costs, by telling more often."""
    import numpy as np

    import spdk_kv
    from spdk_kv.metrics import Publisher, published

    published._LEAST_IDLE = 0  # or it would spare the processor
    start = Publisher.start
    Publisher.start = lambda self: None  # type: ignore[method-assign]
    shares: dict[str, list[float]] = {"clock": [], "CPU time": []}
    told = 0
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        spdk_kv.open(f"file://{place}/store", capacity="1 GiB") as store,
    ):
        names = [str(number) for number in range(64)]
        store.put_many({name: np.full(1 << 20, 7, np.uint8) for name in names})
        into = [np.zeros(1 << 20, np.uint8) for _ in names]
        worker = Worker(lambda: len(store.get_many(names, out=into)), lambda: None)

        def one(tells: bool) -> tuple[int, float, float]:
            nonlocal told
            if not tells:
                return worker.slice()
            publisher = Publisher(f"{place}/store", store.sample, interval_s=0.01)
            start(publisher)
            try:
                return worker.slice()
            finally:
                told += publisher._count
                publisher.close()

        for number in range(rounds):
            found = {tells: one(tells) for tells in ((True, False), (False, True))[number % 2]}
            for name, at in (("clock", 1), ("CPU time", 2)):
                (more, *spent), (done, *base) = found[True], found[False]
                shares[name].append((spent[at - 1] / more) / (base[at - 1] / done))
    each_s = told / rounds / SLICE_S
    print(f"told {each_s:.0f} times a second")
    for name, each in shares.items():
        low, middle, high = (share - 1 for share in statistics.quantiles(each, n=4))
        print(
            f"{name}: {middle:+.1%} ({low:+.1%} to {high:+.1%}); "
            f"told once a second {middle / each_s:+.3%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the drive to measure")
    parser.add_argument("--before", type=Path, help="where a version without metrics is installed")
    parser.add_argument("--after", type=Path, help="where this one is; default: this checkout's")
    parser.add_argument("--often", action="store_true", help="what telling costs, and only that")
    parser.add_argument("--rounds", type=int, default=90)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        serve(given.way, str(given.folder))
        return
    if given.often:
        often(given.folder, given.rounds)
        return
    runs = measured(given, ("before", *WAYS) if given.before else WAYS)
    figures = figures_of(runs)
    for name, each in figures.items():
        low, middle, high = each["quartiles"]
        print(
            f"{name:<28} {each['total']:>10,.0f}  {each['of_silent']:.4f} of silent; rounds "
            f"{low:.3f}, {middle:.3f}, {high:.3f}"
        )
    if given.json:
        report = {
            "date": calendar.today().isoformat(),
            "commit": machine.commit(),
            "machine": machine.describe(given.folder),
            "rounds": given.rounds,
            "figures": figures,
            "runs": runs,
        }
        given.json.write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
