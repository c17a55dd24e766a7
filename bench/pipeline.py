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
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fast_drive
import machine
import record
from runs.link import CHUNKS, DEPTH, OPS, SEGMENT, Bench, drive_alone, links, measure_link
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.measure import fill
from spdk_kv.units import GIB, KIB, MIB, format_nbytes, parse_nbytes

TARGET = record.Target("at least", 0.95)


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
        verdict = _figure(label, way, found).verdict
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


def _figure(label: str, way: str, found: dict[str, Any]) -> record.Figure:
    """What ``way`` reached of the slower of drive and link."""
    reached = [one[way]["reached"] for one in found["rounds"]]
    target = TARGET if way.startswith("adaptive") else None
    return record.figure(f"{label}: {way}", reached, "of the slower of drive and link", target)


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
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
    records: list[record.Record] = []
    with ExitStack() as undo:
        folders = [folder.resolve() for folder in words.dir]
        if words.fast_drive:
            folders.append(undo.enter_context(fast_drive.fast_drive(words.size + GIB)))
        records += [_report(folder, words) for folder in folders]
    if words.json:
        record.write(words.json, records)


def _report(folder: Path, words: argparse.Namespace) -> record.Record:
    """Measures on the drive under ``folder`` and prints the report."""
    lines = machine.describe(folder)
    copies = "copies move nothing" if words.still else "copies move their bytes"
    method = (
        f"{words.rounds} rounds of {words.seconds:g} s per run, tensors of "
        f"{format_nbytes(words.tensor)}, emulated {copies}, {words.latency:g} us more for each"
    )
    print(f"\n## {machine.drive(folder)}\n")
    print(*(f"- {line}" for line in [*lines, f"method: {method}"]), "", sep="\n")
    found = measure_drive(folder, words)
    figures = [_figure(label, way, one) for label, one in found.items() for way in one["ways"]]
    return record.today("pipeline", machine.label(folder), lines, method, figures, found)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
