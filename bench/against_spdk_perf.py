"""spdk_kv's engine `spdk` against spdk_nvme_perf: same drive, size, depth and core, same run.

    python bench/against_spdk_perf.py [--small] [--quick] [--json FILE]

The drive is simulated: a target with its bytes in memory, on a core of its own, over vfio-user.
Needs root, two cores, and SPDK's nvmf_tgt and spdk_nvme_perf on the PATH. Every round makes every
run once, ours and perf's in turn; a ratio is taken within its round. Whatever else runs on the
machine takes most of the speed away from both sides: check the load that is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch

import machine
import record
from runs.spdk import DRIVE_NBYTES, SMALL_ROWS, Figure, Row, fill, rows
from spdk_kv.units import MIB
from spdk_perf import LABEL, SimulatedDrive, simulated_drive

Rounds = dict[str, list[tuple[Figure, Figure]]]


def table(compared: list[Row], figures: Rounds) -> list[str]:
    lines = [
        "| what | ours | perf | ratio, median (min to max) | target | | CPU-s/GiB, ours and perf |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in compared:
        pairs = figures[row.label]
        ours, perf = (statistics.median(pair[side].value for pair in pairs) for side in (0, 1))
        found = row.compared(pairs)
        spread = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
        cells = (
            row.label,
            f"{ours:,.4g} {row.unit}" if row.unit != "IOPS" else f"{ours:,.0f} IOPS",
            f"{perf:,.4g}" if row.unit != "IOPS" else f"{perf:,.0f}",
            f"{found.value:.3f}{spread}",
            found.wanted,
            found.verdict,
            _cpu(pairs),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cpu(pairs: list[tuple[Figure, Figure]]) -> str:
    sides = [[pair[side].cpu_s_per_gib for pair in pairs] for side in (0, 1)]
    known = [[one for one in side if one is not None] for side in sides]
    if not all(known):
        return ""
    return " and ".join(f"{statistics.median(side):.3f}" for side in known)


def measure_all(
    rounds: int, seconds: float, drive: SimulatedDrive, small: bool
) -> tuple[list[Row], Rounds]:
    """Every row, and its pairs of figures in the order of the rounds. ``small``: of the engine's
    commands of 4 KiB alone."""
    compared = [row for row in rows(drive, seconds) if not small or SMALL_ROWS in row.label]
    figures: Rounds = {row.label: [] for row in compared}
    for number in range(rounds):
        for row in compared:
            if sys.stderr.isatty():
                said = f"round {number + 1} of {rounds}: {row.label}"
                print(f"\r\x1b[K{said}", end="", file=sys.stderr, flush=True)
            if number % 2:
                perf, ours = row.perf(), row.ours()
            else:
                ours, perf = row.ours(), row.perf()
            figures[row.label].append((ours, perf))
    return compared, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one run")
    parser.add_argument("--rounds", type=int, help="rounds of all runs (5; small: 24)")
    parser.add_argument("--small", action="store_true", help="only commands of 4 KiB, many rounds")
    parser.add_argument("--quick", action="store_true", help="one short round: a look only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
    words = parser.parse_args()
    if words.quick:
        words.seconds, words.rounds = 1.0, words.rounds or 1
    words.rounds = words.rounds or (24 if words.small else 5)
    lines = machine.describe(None, "spdk_nvme_perf")
    with simulated_drive(DRIVE_NBYTES, 768 * MIB) as drive:
        # perf has one core, and so have we: all our threads share it.
        os.sched_setaffinity(0, {drive.client_core})
        torch.set_num_threads(1)
        fill(drive)
        compared, figures = measure_all(words.rounds, words.seconds, drive, words.small)
    lines.append(
        f"drive: {LABEL}, 1 GiB, blocks of 4 KiB; the target polls core {drive.drive_core}, "
        f"whoever measures has core {drive.client_core}"
    )
    method = f"{words.rounds} rounds of {words.seconds:g} s per run; perf polls all the time"
    print(f"\n## {LABEL}\n")
    print(*(f"- {line}" for line in [*lines, f"method: {method}"]), "", sep="\n")
    print(*table(compared, figures), sep="\n")
    if words.json:
        found = [row.compared(figures[row.label]) for row in compared]
        runs = {
            name: [[ours.value, perf.value] for ours, perf in pairs]
            for name, pairs in figures.items()
        }
        question = "small" if words.small else "spdk_perf"
        record.write(words.json, [record.today(question, LABEL, lines, method, found, runs)])


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
