"""spdk_kv's engine `spdk` against spdk_nvme_perf over VFIO, inside the lab's virtual machine.

    python bench/over_vfio.py [--quick] [--json FILE]

Boots the lab (vagrant/README.md), takes its drive with scripts/setup_vfio.py, and makes every run
once per round, ours and perf's in turn, each in a process of its own on the same core; a ratio is
taken within its round. The machine is emulated where KVM does not work: its ratios say something,
its speeds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import machine
import record
import spdk_kv
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.measure import Workload, fill, measure
from spdk_kv.units import GIB, KIB, MIB

ROOT = Path(__file__).resolve().parent.parent
LABEL = "simulated (QEMU's NVMe drive, over VFIO)"
SERIAL = "LAB-N0"
DRIVE_NBYTES = 256 * MIB
CORE = 1
TARGET = record.Target("at least", 0.90)
# Operation, bytes, depth.
RUNS = [
    ("read", 128 * KIB, 16),
    ("write", 128 * KIB, 16),
    ("read", MIB, 16),
    ("write", MIB, 16),
    ("randread", 4 * KIB, 32),
]


def ours(address: str, op: str, nbytes: int, depth: int, seconds: float) -> float:
    """Bytes per second through the engine."""
    os.sched_setaffinity(0, {CORE})
    place = parse_location(f"spdk://{address}/1")
    engine = open_engine(place, options=QueueOptions(depth, nbytes))
    try:
        if op == "fill":
            fill(engine, DRIVE_NBYTES)
            return 0.0
        seen = measure(engine, Workload(op, nbytes, DRIVE_NBYTES), seconds)
    finally:
        engine.close()
    return seen.nbytes / seen.elapsed_s


def perf(address: str, op: str, nbytes: int, depth: int, seconds: float) -> float:
    """Bytes per second through spdk_nvme_perf."""
    words = ["spdk_nvme_perf", "-c", hex(1 << CORE), "-q", str(depth), "-o", str(nbytes), "-w", op]
    words += ["-t", str(max(1, round(seconds))), "-r", f"trtype:PCIe traddr:{address}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    total = re.search(r"^Total\s*:\s*([\d.]+)", done.stdout, re.M)
    if done.returncode or total is None:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout)[-1000:].strip()}")
    return float(total[1]) * nbytes


def in_own_process(*words: object) -> float:
    """One of our runs: perf cannot have the drive while a process of ours holds it."""
    command = [sys.executable, __file__, "--one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:].strip())
    return float(done.stdout.splitlines()[-1])


def setup(*words: str) -> dict:
    """scripts/setup_vfio.py; RuntimeError where it does not do it."""
    command = ["python3", str(ROOT / "scripts" / "setup_vfio.py"), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout or done.stderr}")
    return json.loads(done.stdout)


def inside(rounds: int, seconds: float) -> None:
    """In the guest: all runs; the pairs of figures as JSON on the last line."""
    address = next(d["bdf"] for d in setup("status")["drives"] if d["serial"] == SERIAL)
    setup("bind", address, SERIAL, "--yes")
    in_own_process(address, "fill", MIB, 16, 0)
    figures: list[list[tuple[float, float]]] = [[] for _ in RUNS]
    for number in range(rounds):
        for at, run in enumerate(RUNS):
            if number % 2:
                theirs = perf(address, *run, seconds)
                figures[at].append((in_own_process(address, *run, seconds), theirs))
            else:
                mine = in_own_process(address, *run, seconds)
                figures[at].append((mine, perf(address, *run, seconds)))
    print(json.dumps(figures))


def boot(rounds: int, seconds: float) -> tuple[str, list[list[tuple[float, float]]]]:
    """Runs :func:`inside` in a machine of its own. How that runs, and its figures."""
    sys.path.insert(0, str(ROOT / "vagrant"))
    from labkit.hardware import Drive, Hardware
    from labkit.machine import Machine

    with Machine(Hardware([Drive("n0", SERIAL, nbytes=DRIVE_NBYTES)])) as lab:
        done = lab.run(
            *(sys.executable, __file__, "--inside"),
            *("--rounds", rounds, "--seconds", seconds),
            timeout_s=60.0 + rounds * len(RUNS) * (2 * seconds + 30.0),
            env={"PYTHONPATH": str(Path(spdk_kv.__file__).parent.parent)},
        )
        if done.status:
            raise RuntimeError(done.text()[-3000:])
        return str(lab.accelerator), json.loads(done.text("out").splitlines()[-1])


def compared(figures: list[list[tuple[float, float]]]) -> list[record.Figure]:
    """The figure of each run, each round compared within itself."""
    return [
        record.figure(
            f"{op} {nbytes // KIB} KiB x {depth}", [a / b for a, b in pairs], "of perf", TARGET
        )
        for (op, nbytes, depth), pairs in zip(RUNS, figures, strict=True)
    ]


def table(figures: list[list[tuple[float, float]]]) -> list[str]:
    lines = [
        "| what | ours, GiB/s | perf | ratio, median (min to max) | |",
        "|---|---|---|---|---|",
    ]
    for found, pairs in zip(compared(figures), figures, strict=True):
        mine, theirs = (statistics.median(pair[side] for pair in pairs) / GIB for side in (0, 1))
        spread = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
        lines.append(
            f"| {found.what} | {mine:.3g} | {theirs:.3g} | {found.value:.3f}{spread} | "
            f"{found.wanted}: {found.verdict} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round: a look only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one:
        address, op, nbytes, depth, seconds = words.one
        print(ours(address, op, int(nbytes), int(depth), float(seconds)))
        return
    if words.quick:
        words.seconds, words.rounds = 1.0, 1
    if words.inside:
        inside(words.rounds, words.seconds)
        return
    accelerator, figures = boot(words.rounds, words.seconds)
    method = (
        f"{words.rounds} rounds of {words.seconds:g} s per run; perf on the same core; "
        f"{accelerator}, 2 CPUs"
    )
    lines = machine.describe(None, "spdk_nvme_perf")
    print(f"\n## Over VFIO, in the lab's machine: {LABEL}\n")
    print(*(f"- {line}" for line in [*lines, f"method: {method}"]), "", sep="\n")
    print(*table(figures), sep="\n")
    if words.json:
        made = record.today("spdk_perf", LABEL, lines, method, compared(figures), figures)
        record.write(words.json, [made])


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
