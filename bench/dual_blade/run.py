"""DUAL-BLADE's experiment, on any machine: decode and prefill over the memory budget.

    python bench/dual_blade/run.py                 on a simulated drive (needs root)
    python bench/dual_blade/run.py --dir DIR       on the drive under DIR (needs root)

Three parts: every variant over the budgets (--budgets), a budget that changes in mid-run
(--change), and what each part of it gives (--ablation); all of them, unless some are named.
--quick is a look in three minutes at the first with a smaller load.

Each run is a process of its own in a memory cgroup of its own, whose limit is rho times the KV
cache and the variant's own memory: in the prompt the most that a run without a limit held, then
what this run really holds while it decodes. The samples are kept line by
line (--samples); a further call with the same file adds to them, and report.py draws the report
from them again.
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

import ablation  # noqa: E402
import asked  # noqa: E402
import change  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import yardsticks  # noqa: E402
from plan import RHOS, Plan, interleaved, turn  # noqa: E402
from rows import VARIANTS  # noqa: E402

import fast_drive  # noqa: E402
import machine  # noqa: E402
import record  # noqa: E402
from spdk_kv.binding import memory_group, why_impossible  # noqa: E402
from spdk_kv.measure import (  # noqa: E402
    Case,
    Load,
    Outcome,
    limits,
    outcome_from,
    run_in_subprocess,
)
from spdk_kv.units import GIB, MIB, format_nbytes  # noqa: E402

# The simulated drive's: the kernel's default for most NVMe drives. A loop device's own depends on
# the kernel's version (2560 KiB was seen).
READ_AHEAD_KIB = 128
_REMOVE_TIMEOUT_S = 10.0


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
        return 1 + max((one.get("run", -1) for one in self.all), default=-1)


class Rig:
    """A drive, what is to be measured on it, and where the samples go. ``link_bytes_s``: the
    emulated link's."""

    def __init__(self, plan: Plan, folder: Path, samples: Samples, file: Path) -> None:
        self.plan = plan
        self.samples = samples
        self._folder = folder
        self._file = file
        probes = [one for one in samples.all if one["kind"] == "probe"]
        self._own = {one["variant"]: outcome_from(one["outcome"]) for one in probes}
        samples.add("copy", gib_s=yardsticks.memory_copy_gib_s())
        best = self.fio()
        self._link_bytes_s = None if plan.link is None else plan.link * best * GIB

    def fio(self) -> float:
        """The drive's best read, GiB/s."""
        seen = yardsticks.drive(self._file, self.plan.fio_s)
        self.samples.add("fio", **seen)
        _say(f"fio: {seen['read_gib_s']:.2f} GiB/s read, {seen['write_gib_s']:.2f} write")
        return seen["read_gib_s"]

    def budget(self, rho: float) -> int:
        """What the page cache may hold, in bytes."""
        return round(rho * self.plan.load.nbytes)

    def limits(self, variant: str, rho: float) -> dict[str, int]:
        """The fields of a Case that leave rho of the KV cache to the page cache beside the
        variant's own memory, which is first measured by a run without a limit, once for all runs
        whose samples are kept together."""
        if variant not in self._own:
            outcome = self.case(variant, self.plan.load, seconds=0.0)
            if outcome.error:
                raise RuntimeError(f"{variant} without a limit: {outcome.error}")
            self._own[variant] = outcome
            self.samples.add("probe", variant=variant, outcome=asdict(outcome))
            most, held = format_nbytes(outcome.other_nbytes), format_nbytes(outcome.held_nbytes)
            _say(f"{variant}: own memory {most}, decoding {held}; {_summary(outcome)}")
        return limits(self._own[variant], self.budget(rho))

    def case(self, variant: str, load: Load, **more: Any) -> Outcome:
        """One run. ``more``: other fields of a Case."""
        with memory_group() as group:
            group.forbid_swap()
            case = Case(
                variant=variant,
                folder=str(self._folder),
                load=asdict(load),
                group=str(group.path),
                group_version=group.version,
                compute_s=self.plan.compute_s,
                link_bytes_s=self._link_bytes_s,
                drop_caches=True,
                **more,
            )
            return run_in_subprocess(case, HERE / "child.py")


def measure(plan: Plan, folder: Path, samples: Samples) -> None:
    """All runs of the plan on the drive under ``folder``."""
    first = samples.next_run()
    with yardsticks.fio_file(folder, plan.fio_nbytes) as file:
        rig = Rig(plan, folder, samples, file)
        for number in range(first, first + plan.runs):
            for part in plan.parts:
                _PARTS[part](rig, number)
            rig.fio()


def _budgets(rig: Rig, number: int) -> None:
    for rho, variant in interleaved(rig.plan, number):
        outcome = rig.case(variant, rig.plan.load, **rig.limits(variant, rho))
        rig.samples.add("case", run=number, rho=rho, outcome=asdict(outcome))
        _say(f"run {number}, rho {rho:g}, {variant}: {_summary(outcome)}")


def _change(rig: Rig, number: int) -> None:
    load, rhos = change.load_for(rig.plan.load), change.budgets()
    for variant in turn([name for name in change.VARIANTS if name in rig.plan.variants], number):
        changes = {str(step): rig.budget(rho) for step, rho in change.changes()}
        outcome = rig.case(variant, load, **rig.limits(variant, rhos[0]), changes=changes)
        rig.samples.add("change", run=number, rhos=rhos, outcome=asdict(outcome))
        _say(f"run {number}, changing budget, {variant}: {_summary(outcome)}")


def _ablation(rig: Rig, number: int) -> None:
    memory = rig.limits("dual", ablation.RHO)
    for setting in turn(ablation.SETTINGS, number):
        outcome = rig.case(
            setting.variant,
            rig.plan.load,
            **memory,
            ahead=setting.ahead,
            options=setting.options(rig.plan.load),
        )
        rig.samples.add("ablation", **ablation.fields(setting, outcome, number))
        _say(f"run {number}, {setting.label}: {_summary(outcome)}")


_PARTS = {"budgets": _budgets, "change": _change, "ablation": _ablation}


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
    mount = fast_drive.make(needed)
    try:
        _touch(mount)
        _read_ahead(mount, READ_AHEAD_KIB)
        yield mount
    finally:
        _remove(mount)


def _remove(mount: Path) -> None:
    """An interrupted fio ends when its last request does; until then its file is open."""
    until = time.monotonic() + _REMOVE_TIMEOUT_S
    while True:
        try:
            fast_drive.remove(mount)
            return
        except RuntimeError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


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


_PART_WORDS = {
    "budgets": "every variant at every budget",
    "change": "a budget that changes in mid-run",
    "ablation": "the parts one by one, and a sweep of budgets",
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a folder on the drive; default: a simulated one")
    parser.add_argument("--quick", action="store_true", help="a look: 3 budgets, 1 GiB, one run")
    for part, what in _PART_WORDS.items():
        parser.add_argument(f"--{part}", action="store_true", help=what)
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
    parser.add_argument("--samples", type=Path, help="default: OUT/samples.jsonl, started afresh")
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
        parts=tuple(part for part in _PARTS if getattr(words, part))
        or (("budgets",) if quick else tuple(_PARTS)),
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
            rows, text = report.write(samples.all, words.out, words.json)
            kept = _record(folder, samples, rows, plan)
            record.write(words.out / "record.json", [kept])
        except (OSError, RuntimeError, ValueError) as failed:
            sys.exit(f"error: {failed}")
    print(text)
    if reason := plots.missing():
        _say(f"no plots: {reason}; then: report.py {path}")
    _say(f"{words.out / 'README.md'}, after {time.monotonic() - began:.0f} s")


def _record(
    folder: Path, samples: Samples, rows: list[dict[str, Any]], plan: Plan
) -> record.Record:
    """What RESULTS.md takes of this run; the rows and samples have every single figure."""
    about = next(one for one in samples.all if one["kind"] == "about")
    method = (
        f"{plan.runs} interleaved runs, KV cache of {format_nbytes(plan.load.nbytes)} after the "
        f"prompt, {plan.load.generate} tokens, link: {about['link_text']}"
    )
    return record.today(
        "decode", machine.label(folder), about["machine"], method, asked.figures(rows)
    )


def _begin(samples: Samples, plan: Plan, folder: Path) -> None:
    load = asdict(plan.load)
    earlier = [one for one in samples.all if one["kind"] == "about"]
    if earlier and (earlier[0]["load"], earlier[0]["link"]) != (load, plan.link):
        raise ValueError("the samples kept there are of another load or link")
    if any(one["kind"] == "probe" and "outcome" not in one for one in samples.all):
        raise ValueError("the samples kept there had more memory than rho says: begin a new file")
    if not earlier:
        link = "none: KV is of use in host memory"
        if plan.link is not None:
            link = f"{plan.link:g} times the drive's best, emulated by waiting"
        samples.add(
            "about", title="Decode and prefill over the memory budget", load=load, link=plan.link,
            link_text=link, compute_s=plan.compute_s, machine=machine.describe(folder),
        )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; what was measured so far is among the samples")
