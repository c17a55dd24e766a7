"""DUAL-BLADE's experiment, on any machine: decode and prefill over the memory budget.

    python bench/dual_blade/run.py                 on a simulated drive (needs root)
    python bench/dual_blade/run.py --dir DIR       on the drive under DIR (needs root)

Each run is a process of its own in a memory cgroup of its own, whose limit is the variant's own
memory (measured by a run without a limit) and rho times the KV cache. --quick is a look in three
minutes at a smaller load. The samples are kept line by line (--samples); a further call with the
same file adds to them, and report.py draws the report from them again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fast_drive  # noqa: E402
import machine  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import yardsticks  # noqa: E402
from plan import RHOS, Plan, interleaved  # noqa: E402
from rows import VARIANTS, limit_nbytes  # noqa: E402

from spdk_kv.cli.decode_case import Case, Outcome, run_apart  # noqa: E402
from spdk_kv.cli.decode_load import Load  # noqa: E402
from spdk_kv.cli.memory_limit import memory_group, why_impossible  # noqa: E402
from spdk_kv.units import GIB, MIB, format_nbytes  # noqa: E402

# The simulated drive's: the kernel's default for most NVMe drives. A loop device's own depends on
# the kernel's version (2560 KiB was seen).
READ_AHEAD_KIB = 128


class Samples:
    """Keeps what is measured, in memory and line by line in a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.all = report.read_samples(path) if path.exists() else []
        self._file = path.open("a")

    def add(self, kind: str, **fields: Any) -> None:
        sample = {"kind": kind, **fields}
        self.all.append(sample)
        self._file.write(json.dumps(sample) + "\n")
        self._file.flush()

    def next_run(self) -> int:
        return 1 + max((one["run"] for one in self.all if one["kind"] == "case"), default=-1)


def measure(plan: Plan, folder: Path, samples: Samples) -> None:
    """All runs of the plan on the drive under ``folder``."""
    first = samples.next_run()
    with yardsticks.fio_file(folder, plan.fio_nbytes) as file:
        samples.add("copy", gib_s=yardsticks.memory_copy_gib_s())
        fio_gib_s = _fio(plan, file, samples)
        link = None if plan.link is None else plan.link * fio_gib_s * GIB
        own = {name: _own_memory(plan, name, folder, link, samples) for name in plan.variants}
        for number in range(first, first + plan.runs):
            for rho, variant in interleaved(plan, number):
                limit = limit_nbytes(own[variant], rho, plan.load)
                outcome = _case(plan, variant, folder, link, limit)
                samples.add("case", run=number, rho=rho, outcome=asdict(outcome))
                _say(f"run {number}, rho {rho:g}, {variant}: {_summary(outcome)}")
            _fio(plan, file, samples)


def _fio(plan: Plan, file: Path, samples: Samples) -> float:
    seen = yardsticks.drive(file, plan.fio_s)
    samples.add("fio", **seen)
    _say(f"fio: {seen['read_gib_s']:.2f} GiB/s read, {seen['write_gib_s']:.2f} write")
    return seen["read_gib_s"]


def _own_memory(
    plan: Plan, variant: str, folder: Path, link: float | None, samples: Samples
) -> int:
    """Anonymous, pinned and kernel memory of a variant while nothing limits it."""
    outcome = _case(plan, variant, folder, link, None, seconds=0.0)
    if outcome.error:
        raise RuntimeError(f"{variant} without a limit: {outcome.error}")
    samples.add("probe", variant=variant, other_nbytes=outcome.other_nbytes)
    _say(f"{variant}: own memory {format_nbytes(outcome.other_nbytes)}; {_summary(outcome)}")
    return outcome.other_nbytes


def _case(
    plan: Plan,
    variant: str,
    folder: Path,
    link: float | None,
    limit: int | None,
    seconds: float | None = None,
) -> Outcome:
    with memory_group() as group:
        group.forbid_swap()
        case = Case(
            variant=variant,
            folder=str(folder),
            load=asdict(plan.load),
            group=str(group.path),
            group_version=group.version,
            limit_nbytes=limit,
            compute_s=plan.compute_s,
            link_bytes_s=link,
            drop_caches=True,
            seconds=seconds,
        )
        return run_apart(case, HERE / "child.py")


def _summary(outcome: Outcome) -> str:
    if outcome.error:
        return f"failed: {outcome.error}"
    hits = "" if outcome.hit_rate is None else f", {outcome.hit_rate:.0%} from memory"
    return f"prefill {outcome.prefill_s:.2f} s, decode {outcome.step_s:.3f} s per token{hits}"


@contextmanager
def place(words: argparse.Namespace, plan: Plan) -> Iterator[Path]:
    """The folder to work in: --dir, or a simulated drive with room for everything."""
    if words.dir is not None:
        yield words.dir
        return
    needed = plan.load.capacity_nbytes + plan.load.capacity_nbytes // 8 + plan.fio_nbytes + GIB
    with fast_drive.fast_drive(needed) as mount:
        _touch(mount)
        _read_ahead(mount, READ_AHEAD_KIB)
        yield mount


def _touch(mount: Path) -> None:
    """Writes the whole simulated drive once. Its memory is then there, and charged to nobody who
    is limited later."""
    space = os.statvfs(mount)
    free = space.f_bavail * space.f_frsize - 64 * MIB
    with yardsticks.fio_file(mount, free - free % MIB):
        pass


def _read_ahead(mount: Path, kib: int) -> None:
    number = os.stat(mount).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    (device / "queue/read_ahead_kb").write_text(str(kib))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.replace(",", " ").split())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a folder on the drive; default: a simulated one")
    parser.add_argument("--quick", action="store_true", help="a look: 3 budgets, 1 GiB, one run")
    parser.add_argument("--runs", type=int, help="runs of every case (5; quick: 1)")
    parser.add_argument("--rho", type=_numbers, help="budgets as shares of the KV cache")
    parser.add_argument("--variants", type=lambda text: tuple(text.replace(",", " ").split()))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--batch", type=int, help="rows that decode together (16; quick: 8)")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--generate", type=int, help="tokens (32; quick: 6)")
    parser.add_argument("--compute-ms", type=float, default=0.0, help="computing per layer")
    parser.add_argument("--link", choices=("none", "2.3", "3.8"), default="none",
                        help="an emulated link to a GPU, in times of the drive's best")  # fmt: skip
    parser.add_argument("--fio-seconds", type=float, help="of each fio job (3; quick: 1)")
    parser.add_argument("--out", type=Path, default=Path("dual_blade"), help="folder of the report")
    parser.add_argument("--samples", type=Path, help="default: OUT/samples.jsonl, begun anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows there as well")
    words = parser.parse_args()
    unknown = set(words.variants or ()) - {*VARIANTS, "paper"}
    if unknown:
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}")
    return words


def _plan(words: argparse.Namespace) -> Plan:
    quick = words.quick
    load = Load(
        layers=words.layers,
        hidden=words.hidden,
        batch=words.batch or (8 if quick else 16),
        prompt=words.prompt,
        generate=words.generate or (6 if quick else 32),
    )
    return Plan(
        load=load,
        variants=words.variants or VARIANTS,
        rhos=words.rho or ((0.33, 0.66, 1.2) if quick else RHOS),
        runs=words.runs or (1 if quick else 5),
        compute_s=words.compute_ms / 1e3,
        link=None if words.link == "none" else float(words.link),
        fio_s=words.fio_seconds or (1.0 if quick else 3.0),
        # fio's file is no larger than what the load reads.
        fio_nbytes=max(16 * MIB, min(GIB, load.nbytes)),
    )


def main() -> None:
    words = _arguments()
    if reason := why_impossible():
        sys.exit(f"error: {reason}")
    if os.geteuid() != 0:
        sys.exit("error: emptying the page cache before each run needs root")
    began = time.monotonic()
    with ExitStack() as stack:
        try:
            plan = _plan(words)
            folder = stack.enter_context(place(words, plan))
            path = words.samples or words.out / "samples.jsonl"
            if words.samples is None:
                path.unlink(missing_ok=True)
            samples = Samples(path)
            _begin(samples, plan, folder)
            measure(plan, folder, samples)
            _, text = report.write(samples.all, words.out, words.json)
        except (OSError, RuntimeError, ValueError) as failed:
            sys.exit(f"error: {failed}")
    print(text)
    if reason := plots.missing():
        _say(f"no plots: {reason}; then: report.py {path}")
    _say(f"{words.out / 'README.md'}, after {time.monotonic() - began:.0f} s")


def _begin(samples: Samples, plan: Plan, folder: Path) -> None:
    load = asdict(plan.load)
    earlier = [one for one in samples.all if one["kind"] == "about"]
    if earlier and (earlier[0]["load"], earlier[0]["link"]) != (load, plan.link):
        raise ValueError("the samples kept there are of another load or link")
    if not earlier:
        link = "none: KV is of use in host memory"
        if plan.link is not None:
            link = f"{plan.link:g} times the drive's best, emulated by waiting"
        samples.add(
            "about", title="Decode and prefill over the memory budget", load=load, link=plan.link,
            link_text=link, compute_s=plan.compute_s, machine=machine.describe(folder),
        )  # fmt: skip


if __name__ == "__main__":
    main()
