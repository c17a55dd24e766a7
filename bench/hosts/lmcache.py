"""LMCache's second level: spdk_kv against LMCache's own adapters with O_DIRECT, by its own bench.

    .hosts/lmcache/bin/python bench/hosts/lmcache.py --dir DIR [--fast-drive] [--json FILE]

Run it with the Python of an environment that has LMCache and spdk_kv: `scripts/test.sh --hosts
lmcache` makes one. The adapter raw_block also needs `aiofile`, `transformers` and
`lmcache-rust-raw-block-io`; what cannot be made is left out, with the reason.

Each run is a process of its own that makes one adapter on an empty folder and has the functions of
`lmcache bench l2` store and load rounds of 2 batches of 16 objects, all under keys of their own.
CPU time is that of the process from the first submit of a round to its end, so that what the bench
does between rounds counts for nobody. What was loaded is compared with what was stored, every round
and every byte; in spdk_kv each load has been checked by its checksum before. The file of spdk_kv's
store and the one that raw_block takes for a drive were written once before. Runs are interleaved,
and every other round of them goes backwards.
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
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
# LMCache's own name must not be this file's.
sys.path[:] = [
    str(BENCH),
    *(path for path in sys.path if Path(path or ".").resolve() != BENCH / "hosts"),
]

KEYS, IN_FLIGHT, WARMUP = 16, 2, 2
OURS = "spdk_kv"
THEIRS = ("fs", "fs_native", "raw_block")
SIZES_KIB = (1024, 256)
FASTER, LESS_CPU = 1.2, 0.8


# -- one run, in a process of its own -------------------------------------------------------------


def adapter_config(name: str, folder: Path, object_nbytes: int, total: int) -> dict[str, Any]:
    if name == OURS:
        params = {
            "location": f"file://{folder}",
            "capacity": 2 * total,
            "engine": {"discard": False},
        }
        write_once(params, total)
        return {
            "type": "native_plugin",
            "module_path": "spdk_kv.integrations.lmcache",
            "class_name": "Client",
            "adapter_params": params,
        }
    if name != "raw_block":
        return {"type": name, "base_path": str(folder), "use_odirect": True}
    device, slot = folder / "device", object_nbytes + 4096
    index = 256 << 20
    nbytes = index + 2 * total // object_nbytes * slot
    with open(device, "wb") as file:
        # Written once, as a drive's blocks are.
        for _ in range(-(-nbytes // (16 << 20))):
            file.write(bytes(16 << 20))
        os.fsync(file.fileno())
    return {
        "type": "raw_block",
        "device_path": str(device),
        "slot_bytes": slot,
        "meta_total_bytes": index,
        "io_engine": "io_uring",
        "use_odirect": True,
    }


def write_once(params: dict[str, Any], total: int) -> None:
    """Begins a store whose file was written once, as a drive's blocks are, and holds nothing."""
    import numpy as np

    from spdk_kv.integrations.lmcache import Client

    client = Client(**params)
    for at in range(0, total, 16 << 20):
        client.store.put(f"{at}", np.zeros(min(16 << 20, total - at), np.uint8))
    for key in client.store.keys(""):
        client.store.delete(key)
    client.close()


class Meter:
    """The CPU time of rounds, each from its first submit on."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._begun: float | None = None
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def submit_store_task(self, keys: Any, objects: Any) -> Any:
        self._begin()
        return self._adapter.submit_store_task(keys, objects)

    def submit_load_task(self, keys: Any, objects: Any) -> Any:
        self._begin()
        return self._adapter.submit_load_task(keys, objects)

    def _begin(self) -> None:
        if self._begun is None:
            self._begun = time.process_time()

    def end(self) -> None:
        if self._begun is not None:
            self.seconds.append(time.process_time() - self._begun)
            self._begun = None


def child(name: str, folder: Path, kib: int, rounds: int, huge: bool) -> dict[str, Any]:
    """Durations (s) and CPU seconds of each round, storing and loading."""
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    import torch
    from lmcache.cli.commands.bench.l2_adapter_bench import data, runner
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

    nbytes, every = kib << 10, WARMUP + rounds
    wave = IN_FLIGHT * KEYS * nbytes
    config = adapter_config(name, folder, nbytes, every * wave)
    parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(config)]))
    memory = data.make_aligned_tensor(2 * wave, 4096, use_hugepages=huge)
    desc = data.create_l1_memory_desc(memory, align_bytes=4096)
    meter = Meter(create_l2_adapter(parsed.adapters[0], l1_memory_desc=desc))

    def batches(start: int) -> list[Any]:
        step = KEYS * nbytes
        return [
            data.make_memory_objects(memory, KEYS, nbytes, start + at * step)
            for at in range(IN_FLIGHT)
        ]

    stored, loaded = batches(0), batches(wave)
    noise = torch.randint(0, 256, (wave,), dtype=torch.uint8)
    memory[:wave] = noise

    def stamp(of: torch.Tensor, number: int) -> None:
        """Makes the objects of each round differ."""
        of.view(IN_FLIGHT * KEYS, nbytes)[:, 17] = number % 251

    def keys(number: int) -> list[Any]:
        meter.end()
        base = number * IN_FLIGHT * KEYS
        return [data.make_object_keys(KEYS, key_offset=base + at * KEYS) for at in range(IN_FLIGHT)]

    def storing(number: int) -> list[Any]:
        stamp(memory[:wave], number)
        return stored

    def verify(number: int) -> None:
        stamp(noise, number)
        if not torch.equal(memory[wave:], noise):
            raise SystemExit(f"{name}: what was loaded in round {number} is not what was stored")

    def loading(number: int) -> list[Any]:
        if number:
            verify(number - 1)
        return loaded

    common = {"in_flight": IN_FLIGHT, "num_keys": KEYS, "data_size": nbytes, "rounds": every}
    quiet = {"log": lambda text: None, "keys_for_round": keys}
    found = {}
    for what, bench, objects in (
        ("store", runner.bench_store, storing),
        ("load", runner.bench_load, loading),
    ):
        meter.seconds.clear()
        result = bench(meter, objs_for_round=objects, **common, **quiet)
        meter.end()
        if result.total_success != every * IN_FLIGHT * KEYS or result.timed_out_rounds:
            raise SystemExit(f"{name}: {what}: {result.total_success} objects of {every * 32}")
        found[what] = {
            "seconds": result.round_durations[WARMUP:],
            "cpu": meter.seconds[WARMUP:],
        }
    verify(every - 1)
    meter.close()
    return {"nbytes": wave, **found}


def run(name: str, folder: Path, kib: int, rounds: int, huge: bool) -> dict[str, Any] | str:
    """A run's figures, or why there are none."""
    with tempfile.TemporaryDirectory(prefix=f"lmcache-{name}-", dir=folder) as place:
        asked = [name, place, str(kib), str(rounds), str(int(huge))]
        done = subprocess.run(
            [sys.executable, __file__, "--child", *asked],
            capture_output=True,
            text=True,
            check=False,
            # What torch does between the rounds would go on spinning into them.
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return said[-1] if said else f"exit status {done.returncode}"
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


# -- all runs, and the table ----------------------------------------------------------------------


def p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


class Side:
    """What one adapter did at one size: of each run the speed and CPU, of all rounds the times."""

    def __init__(self, runs: list[dict[str, Any]], what: str) -> None:
        gib = [run["nbytes"] * len(run[what]["seconds"]) / (1 << 30) for run in runs]
        self.mib_s = [
            1024 * size / sum(run[what]["seconds"]) for size, run in zip(gib, runs, strict=True)
        ]
        self.cpu = [sum(run[what]["cpu"]) / size for size, run in zip(gib, runs, strict=True)]
        self.p99_ms = 1000 * p99([second for run in runs for second in run[what]["seconds"]])

    @property
    def speed(self) -> float:
        return statistics.median(self.mib_s)


def rows(kib: int, sides: dict[str, dict[str, Side]]) -> list[Any]:
    """What is kept of the adapters at one size."""
    import record

    return [
        record.Side(
            f"{what} {kib} KiB",
            name,
            [
                record.figure("speed", of[what].mib_s, "MiB/s"),
                record.figure("CPU", of[what].cpu, "s/GiB"),
                record.figure("p99 of a round", [of[what].p99_ms], "ms"),
            ],
        )
        for what in ("store", "load")
        for name, of in sides.items()
    ]


def verdicts(kib: int, sides: dict[str, dict[str, Side]]) -> list[Any]:
    """The targets: against the fastest of theirs, in that direction."""
    from record import Target, figure

    found = []
    for what in ("store", "load"):
        ours = sides[OURS][what]
        name = max((one for one in sides if one in THEIRS), key=lambda one: sides[one][what].speed)
        theirs = sides[name][what]
        ratios = [a / b for a, b in zip(ours.mib_s, theirs.mib_s, strict=False)]
        cpus = [a / b for a, b in zip(ours.cpu, theirs.cpu, strict=False)]
        label = f"{what} {kib} KiB"
        found += [
            figure(label, ratios, f"of {name}", Target("at least", FASTER)),
            figure(f"CPU, {label}", cpus, f"of {name}", Target("at most", LESS_CPU)),
            figure(
                f"p99, {label}", [ours.p99_ms / theirs.p99_ms], f"of {name}", Target("at most", 1.0)
            ),
        ]
    return found


def measure(folder: Path, words: argparse.Namespace) -> Any:
    import machine
    import record
    import side_by_side

    names = [OURS, *THEIRS]
    lines = machine.describe(folder, "LMCache 0.5.6")
    method = (
        f"{words.runs} runs of {words.rounds} rounds of {IN_FLIGHT} batches of {KEYS} objects each"
        + (", LMCache's memory on reserved huge pages" if words.l1_hugepages else "")
    )
    print(f"\n## {machine.drive(folder)}\n", *(f"- {one}" for one in [*lines, method]), sep="\n")
    figures, compared, kept = [], [], {}
    for kib in words.kib:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(words.runs):
            for name in names if number % 2 == 0 else reversed(names):
                if name not in runs:
                    continue
                found = run(name, folder, kib, words.rounds, words.l1_hugepages)
                if isinstance(found, str):
                    print(f"\n- without {name}: {found}", flush=True)
                    del runs[name]
                else:
                    runs[name].append(found)
        if OURS not in runs or len(runs) == 1:
            raise RuntimeError("nothing to compare")
        sides = {
            name: {what: Side(done, what) for what in ("store", "load")}
            for name, done in runs.items()
        }
        compared += rows(kib, sides)
        print("", *side_by_side.table(rows(kib, sides)), sep="\n")
        chosen = verdicts(kib, sides)
        print("\n| what | measured | target | |", "|---|---|---|---|", sep="\n")
        for one in chosen:
            low = "" if one.low is None else f" ({one.low:.2f} to {one.high:.2f})"
            print(
                f"| {one.what} | {one.value:.2f}{low} {one.unit} | {one.wanted} | {one.verdict} |"
            )
        sys.stdout.flush()
        figures += chosen
        kept[str(kib)] = runs
    label = machine.label(folder)
    return record.today("host_lmcache", label, lines, method, figures, kept, compared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, action="append", default=[], help="a folder to work in")
    parser.add_argument("--fast-drive", action="store_true", help="a simulated drive as well")
    parser.add_argument("--runs", type=int, default=5, help="of each adapter and size")
    parser.add_argument("--rounds", type=int, default=24, help="in each run, after the warm-up")
    parser.add_argument("--kib", type=int, action="append", help="of an object (1024 and 256)")
    parser.add_argument(
        "--l1-hugepages", action="store_true", help="as LMCache's --l1-use-hugepages"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
    words = parser.parse_args()
    words.kib = words.kib or list(SIZES_KIB)
    if not (words.dir or words.fast_drive):
        parser.error("nothing to do: --dir or --fast-drive")
    records = []
    with ExitStack() as undo:
        folders = [folder.resolve() for folder in words.dir]
        if words.fast_drive:
            import fast_drive

            wave = max(words.kib) * 1024 * IN_FLIGHT * KEYS
            folders.append(
                undo.enter_context(fast_drive.fast_drive(3 * wave * (words.rounds + 2) + (1 << 30)))
            )
        records = [measure(folder, words) for folder in folders]
    if words.json:
        words.json.write_text(json.dumps([asdict(one) for one in records], indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, place, kib, rounds, huge = sys.argv[2:]
        print(json.dumps(child(name, Path(place), int(kib), int(rounds), huge == "1")))
        sys.exit(0)
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
