"""spdk_kv against fio, on the same file, in the same run: the targets, the figures, met or missed.

    python bench/against_fio.py --dir DIR          on the drive under DIR
    python bench/against_fio.py --fast-drive       on a simulated drive (needs root)
    python bench/against_fio.py --software         without a drive: our own cost alone

Any of them together; --small for commands of 16 KiB alone, in many rounds; --quick for a look in
about a minute; --json FILE keeps every single figure, as a list of records (record.py).
Every round makes every run once, ours and fio's in turn and every other round in reverse; a ratio
is taken within its round, so that what slows the machine for a while slows both sides of it.
Ctrl-C ends it and removes its files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import fast_drive
import machine
import record
from runs import own_cost
from runs.drive import TENSOR_NBYTES, Figure, drive_runs
from runs.targets import COMPARISONS, COSTS, SMALL, Comparison, Cost
from spdk_kv.units import GIB, format_nbytes, parse_nbytes

Rounds = dict[str, list[Figure]]


def measure_drive(
    folder: Path, size: int, seconds: float, rounds: int, wanted: Collection[str]
) -> Rounds:
    """Every ``wanted`` run once per round."""
    figures: Rounds = {}
    with drive_runs(folder, size, seconds) as runs:
        runs = {name: run for name, run in runs.items() if name in wanted}
        for number in range(rounds):
            order = list(runs) if number % 2 == 0 else list(reversed(runs))
            for done, name in enumerate(order):
                _say(f"round {number + 1} of {rounds}, run {done + 1} of {len(order)}: {name}")
                figures.setdefault(name, []).append(runs[name]())
        figures = {name: figures[name] for name in runs}
    _say("")
    return figures


def figure_table(figures: Rounds) -> list[str]:
    lines = [
        "| run | GiB/s, median (min to max) | CPU-seconds per GiB, median (min to max) |",
        "|---|---|---|",
    ]
    for name, seen in figures.items():
        speed = _spread([one.gib_s for one in seen], 2)
        cpu = _spread([one.cpu_s_per_gib for one in seen], 3)
        lines.append(f"| {name} | {speed} | {cpu} |")
    return lines


def target_table(comparisons: Sequence[Comparison], figures: Rounds) -> list[str]:
    lines = [
        "| what | ours | fio | compared, median (min to max) | target | |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [_target_row(comparison, figures) for comparison in comparisons]


def _target_row(comparison: Comparison, figures: Rounds) -> str:
    ours, theirs = _sides(comparison, figures)
    found = comparison.compared(ours, theirs)
    spread = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
    cells = (
        comparison.label,
        f"{statistics.median(ours):.3g} {comparison.unit}",
        f"{statistics.median(theirs):.3g}",
        f"{found.value:.3f}{spread}",
        found.wanted,
        found.verdict,
    )
    return f"| {' | '.join(cells)} |"


def _sides(comparison: Comparison, figures: Rounds) -> tuple[list[float], list[float]]:
    ours = [comparison.value(one) for one in figures[comparison.run]]
    return ours, [comparison.value(one) for one in figures[comparison.yardstick]]


def cost_table(figures: dict[str, float]) -> list[str]:
    lines = ["| what | figure | target | |", "|---|---|---|---|"]
    return lines + [_cost_row(cost, figures[cost.figure]) for cost in COSTS]


def _cost_row(cost: Cost, figure: float) -> str:
    found = cost.measured(figure)
    cells = (cost.label, f"{figure:.3g} {cost.unit}", found.wanted, found.verdict)
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], digits: int) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _say(text: str) -> None:
    """On one line of the terminal, if there is one."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, action="append", default=[], help="a folder to work in")
    parser.add_argument("--fast-drive", action="store_true", help="a simulated drive as well")
    parser.add_argument("--software", action="store_true", help="the cost of our own code as well")
    parser.add_argument("--size", type=parse_nbytes, default=GIB, help="bytes of each data file")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run")
    parser.add_argument("--rounds", type=int, help="rounds of all runs (5; small: 24)")
    parser.add_argument("--small", action="store_true", help="only commands of 16 KiB, many rounds")
    parser.add_argument("--quick", action="store_true", help="short runs, two rounds: a look only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
    words = parser.parse_args()
    if words.quick:
        words.seconds, words.rounds = 0.4, words.rounds or 2
    words.rounds = words.rounds or (24 if words.small else 5)
    if not (words.dir or words.fast_drive or words.software):
        parser.error("nothing to do: --dir, --fast-drive or --software")
    if words.size < 4 * TENSOR_NBYTES or words.size % TENSOR_NBYTES:
        parser.error(f"--size is a multiple of {format_nbytes(TENSOR_NBYTES)}, at least four")
    return words


def main() -> None:
    words = _arguments()
    records: list[record.Record] = []
    with ExitStack() as undo:
        folders = [folder.resolve() for folder in words.dir]
        if words.fast_drive:
            # Three files, and what the filesystem and the blobs take.
            folders.append(undo.enter_context(fast_drive.fast_drive(3 * words.size + GIB)))
        records += [_against_fio(folder, words) for folder in folders]
        if words.software:
            records.append(_own_cost(folders[-1] if folders else Path.cwd(), words.quick))
    if words.json:
        record.write(words.json, records)


def _against_fio(folder: Path, words: argparse.Namespace) -> record.Record:
    """Measures on the drive under ``folder`` and prints the report."""
    lines = machine.describe(folder)
    method = (
        f"{words.rounds} rounds of {words.seconds:g} s per run, files of "
        f"{format_nbytes(words.size)}"
    )
    print(f"\n## {machine.drive(folder)}\n")
    print(*(f"- {line}" for line in [*lines, f"method: {method}"]), "", sep="\n")
    chosen = [one for one in COMPARISONS if SMALL in one.label] if words.small else COMPARISONS
    wanted = {name for one in chosen for name in (one.run, one.yardstick)}
    figures = measure_drive(folder, words.size, words.seconds, words.rounds, wanted)
    print(*target_table(chosen, figures), "", *figure_table(figures), sep="\n", flush=True)
    compared = [one.compared(*_sides(one, figures)) for one in chosen]
    runs = {name: [asdict(one) for one in seen] for name, seen in figures.items()}
    question = "small" if words.small else "fio"
    return record.today(question, machine.label(folder), lines, method, compared, runs)


def _own_cost(folder: Path, quick: bool) -> record.Record:
    """Measures without a drive, but for the blobs in ``folder``, and prints the report."""
    lines = machine.describe(folder)
    print("\n## Our own cost\n", *(f"- {line}" for line in lines), "", sep="\n")
    costs = own_cost.null_engine(quick)
    costs |= own_cost.many_blobs(folder / "many-blobs", 20_000 if quick else 100_000)
    method = f"{costs['blobs']:,.0f} blobs of 4 KiB, put in {costs['put_s']:.1f} s"
    print(f"{method}\n", *cost_table(costs), sep="\n")
    figures = [cost.measured(costs[cost.figure]) for cost in COSTS]
    return record.today("own_cost", machine.label(folder), lines, method, figures, costs)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
