"""One decode measurement: one path at one memory limit, in a process of its own.

    python -m spdk_kv.measure.decode.case '{"variant": "dual", "folder": "/mnt/kv", ...}'

The argument is a :class:`Case` as JSON; an :class:`Outcome` is printed as JSON. It runs in a
process of its own because a memory limit applies to processes, and because what one path leaves in
memory must not help or hurt the next.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from spdk_kv.binding import MemoryGroup, drop_page_cache
from spdk_kv.devices import read_text
from spdk_kv.errors import SpdkKvError
from spdk_kv.measure.decode.held import Budget, HeldMemory
from spdk_kv.measure.decode.load import Load, Noise
from spdk_kv.measure.decode.replay import KVPath, Replay, SimulatedGpu, Step, StorePath
from spdk_kv.measure.touch_memory import touch_free_memory

# Variant -> fields of PageCacheOptions. All other settings are the defaults.
STORE_VARIANTS: dict[str, dict[str, Any]] = {
    "direct": {"policy": "direct"},
    "pagecache": {"policy": "pagecache"},
    "paper": {"policy": "paper"},
    "dual": {"policy": "adaptive"},
}

# Decode steps in which a path settles: units are promoted, and buffers are made.
_FIRST_STEPS = 2

_WARM_UP = {"layers": 3, "hidden": 256, "batch": 2, "prompt": 64, "generate": 3}

Maker = Callable[["Case", Noise, SimulatedGpu, Path], KVPath]


@dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
        variant: which path; one of STORE_VARIANTS, or what a caller of :func:`main` adds.
        folder: a folder on the drive to be measured.
        load: the arguments of :class:`Load`.
        group, group_version: the memory cgroup to join; "" for none.
        limit_nbytes: its limit; None for none. With ``cache_nbytes`` that of the prompt.
        cache_nbytes: what the page cache may hold while decoding. After the prompt, and after each
            step, the limit becomes that and what is really held besides; None leaves it alone.
        held_nbytes: what is held besides in the first step, as another run of the variant found.
        compute_s, link_bytes_s: the arguments of :class:`SimulatedGpu`.
        options: further fields of :class:`spdk_kv.PageCacheOptions`.
        ahead: layers that are read ahead of the one in use.
        drop_caches: empty the machine's page cache first (needs root).
        seconds: begin no further step after this time, once there were three; None to do them all.
        changes: step -> ``cache_nbytes`` from that step on.
        relay_nbytes: for paths of `bench/`: the host buffer that copies to the GPU go through.
    """

    variant: str
    folder: str
    load: dict[str, int]
    group: str = ""
    group_version: int = 2
    limit_nbytes: int | None = None
    cache_nbytes: int | None = None
    held_nbytes: int = 0
    compute_s: float = 0.0
    link_bytes_s: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ahead: int = 2
    drop_caches: bool = False
    seconds: float | None = None
    changes: dict[str, int] = field(default_factory=dict)
    relay_nbytes: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was measured; of the decode steps alone unless the name says prefill.

    Attributes:
        steps_nbytes: bytes that each step asked for.
        steps_device_nbytes: bytes that the drive read meanwhile; empty where it has no counters.
        steps_budget_nbytes: the store's budget after each step; empty for other
            paths.
        steps_other_nbytes: the most anonymous, pinned and kernel memory in each step; empty without
            a cgroup.
        steps_cached_nbytes: what the limit left to the page cache in each step: the limit less
            that; empty without a limit.
        other_nbytes: the most of such memory in the whole run, the prompt included.
        cache_nbytes: page cache in the cgroup after the last step.
        cpu_s: CPU time of all threads of the process; the kernel's threads do not count.
        explained: what the path reports about itself.
        error: why there is no measurement; "" if there is one.
    """

    variant: str
    limit_nbytes: int | None
    prefill_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    steps_nbytes: list[int] = field(default_factory=list)
    steps_device_nbytes: list[int] = field(default_factory=list)
    steps_budget_nbytes: list[int] = field(default_factory=list)
    steps_other_nbytes: list[int] = field(default_factory=list)
    steps_cached_nbytes: list[int] = field(default_factory=list)
    prefill_written_nbytes: int | None = None
    other_nbytes: int = 0
    cache_nbytes: int = 0
    major_faults: int = 0
    cpu_s: float = 0.0
    prefill_cpu_s: float = 0.0
    explained: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def later(self) -> slice:
        """The steps that the other properties are computed from: all but the first two, if any."""
        return slice(_FIRST_STEPS if len(self.steps_s) > _FIRST_STEPS else 0, None)

    @property
    def step_s(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.steps_s[self.later])

    @property
    def step_nbytes(self) -> float:
        """Bytes that a step asked for, on average."""
        return statistics.fmean(self.steps_nbytes[self.later])

    @property
    def held_nbytes(self) -> int:
        """The most that was held in a step besides the page cache."""
        return max(self.steps_other_nbytes, default=self.other_nbytes)

    @property
    def cached_nbytes(self) -> float | None:
        """What the limit left to the page cache, in the median step; None without a limit."""
        later = self.steps_cached_nbytes[self.later]
        return statistics.median(later) if later else None

    @property
    def drive_bytes_s(self) -> float | None:
        """Bytes per second that the drive read; None where it has no counters."""
        if not self.steps_device_nbytes:
            return None
        return sum(self.steps_device_nbytes[self.later]) / sum(self.steps_s[self.later])

    @property
    def hit_rate(self) -> float | None:
        """Share of the bytes asked for that did not come from the drive; None if not known."""
        if not self.steps_device_nbytes:
            return None
        asked = sum(self.steps_nbytes[self.later])
        return max(0.0, 1.0 - sum(self.steps_device_nbytes[self.later]) / asked)


def limits(alone: Outcome, cache_nbytes: int) -> dict[str, Any]:
    """The fields of a :class:`Case` that leave ``cache_nbytes`` to the page cache. ``alone``: a run
    of the same variant and load without a limit."""
    return {
        "limit_nbytes": alone.other_nbytes + cache_nbytes,
        "cache_nbytes": cache_nbytes,
        "held_nbytes": alone.held_nbytes,
    }


def cached_share(outcome: Outcome, load: Load) -> float | None:
    """The share of the KV cache that the page cache could hold while decoding; None without a
    limit."""
    cached = outcome.cached_nbytes
    return None if cached is None else cached / load.nbytes


def run_in_subprocess(case: Case, module: str | Path = "spdk_kv.measure.decode.case") -> Outcome:
    """Runs ``case`` in a new process. Blocks.

    Nothing is left in the folder, even if interrupted.

    Args:
        case: what to measure.
        module: this module, or a script that calls :func:`main`.

    Returns:
        The outcome; a failure in the process is its ``error``.
    """
    program = ["-m", module] if isinstance(module, str) else [str(module)]
    try:
        with tempfile.TemporaryDirectory(prefix="decode-", dir=case.folder) as folder:
            words = [*program, json.dumps(asdict(replace(case, folder=folder)))]
            status, output, complaints = _run_process([sys.executable, *words])
    except OSError as failed:
        return Outcome(case.variant, case.limit_nbytes, error=f"{type(failed).__name__}: {failed}")
    if status == 0:
        return outcome_from(json.loads(output.splitlines()[-1]))
    last = (complaints.strip().splitlines() or [f"exit status {status}"])[-1]
    if status == -signal.SIGKILL:
        last = "killed: its memory did not fit into the limit"
    return Outcome(case.variant, case.limit_nbytes, error=last)


def _run_process(words: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr. The process has ended when this returns or raises."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, complaints = process.communicate()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process.returncode, output, complaints


def outcome_from(found: Mapping[str, Any]) -> Outcome:
    """An outcome from its JSON; fields that this version does not know are ignored."""
    known = {one.name for one in fields(Outcome)}
    outcome = Outcome(**{name: value for name, value in found.items() if name in known})
    # Results of version 0.1 call the budget the limit, and available memory the budget.
    if "steps_limit_nbytes" in found:
        outcome = replace(outcome, steps_budget_nbytes=found["steps_limit_nbytes"])
    residency = dict(outcome.explained.get("residency") or {})
    if "limit_nbytes" in residency:
        residency["available_nbytes"] = residency["budget_nbytes"]
        residency["budget_nbytes"] = residency.pop("limit_nbytes")
        outcome = replace(outcome, explained=outcome.explained | {"residency": residency})
    return outcome


def main(makers: Mapping[str, Maker]) -> None:
    """What :func:`run_in_subprocess` starts; ``makers`` add variants to those of the store."""
    # Ctrl-C is handled by the parent, which ends this process and clears up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    case = Case(**json.loads(sys.argv[1]))
    try:
        outcome = _run(case, makers)
    except (SpdkKvError, OSError, ValueError) as failed:
        sys.exit(f"{type(failed).__name__}: {failed}")
    print(json.dumps(asdict(outcome)))


def _run(case: Case, makers: Mapping[str, Maker]) -> Outcome:
    import torch  # noqa: F401 - before the limit, which is not to count its code

    import spdk_kv.store  # noqa: F401

    load = Load(**case.load)
    if case.drop_caches:
        drop_page_cache()
    with _path(replace(case, load=_WARM_UP), makers) as (replay, _):
        # Loads code, which would otherwise be read from the drive and charged to the group.
        replay.prefill()
        replay.step()
        replay.check()
    touch_free_memory(case.limit_nbytes or load.capacity_nbytes)
    group = MemoryGroup(Path(case.group), case.group_version) if case.group else None
    if group is not None:
        group.limit(case.limit_nbytes)
        group.add(os.getpid())
    with _path(case, makers) as (replay, path), ExitStack() as rest:
        held = None
        if group is not None:
            held = HeldMemory(group)
            rest.callback(held.close)
        return _measure(case, load, replay, path, group, held)


@contextmanager
def _path(case: Case, makers: Mapping[str, Maker]) -> Iterator[tuple[Replay, KVPath]]:
    load = Load(**case.load)
    with tempfile.TemporaryDirectory(prefix="decode-", dir=case.folder) as folder:
        noise = Noise(load)
        make = makers.get(case.variant, _make_store)
        path = make(case, noise, SimulatedGpu(case.compute_s, case.link_bytes_s), Path(folder))
        try:
            yield Replay(load, noise, path), path
        finally:
            path.close()


def _make_store(case: Case, noise: Noise, gpu: SimulatedGpu, folder: Path) -> KVPath:
    options = {**STORE_VARIANTS[case.variant], **case.options}
    location = f"file://{folder / 'store'}"
    return StorePath(Load(**case.load), noise, gpu, location, options, case.ahead)


def _measure(
    case: Case,
    load: Load,
    replay: Replay,
    path: KVPath,
    group: MemoryGroup | None,
    held: HeldMemory | None,
) -> Outcome:
    counters = DriveCounters(Path(case.folder))
    before = counters.read()
    cpu = time.process_time()
    prefill_s = replay.prefill()
    prefill_cpu_s = time.process_time() - cpu
    start = seen = counters.read()
    other = held.take() if held else 0
    limited = None
    if group and case.cache_nbytes is not None:
        limited = Budget(group, case.cache_nbytes, case.held_nbytes)
    faults = group.use().major_faults if group else 0
    cpu_s, cache = 0.0, 0
    others: list[int] = []
    cached: list[int] = []
    steps: list[Step] = []
    from_drive: list[int] = []
    budgets: list[int] = []
    while len(steps) < load.steps:
        if limited and (changed := case.changes.get(str(len(steps)))) is not None:
            limited.change(changed)
        cpu = time.process_time()
        steps.append(replay.step())
        cpu_s += time.process_time() - cpu
        if seen and (now := counters.read()):
            from_drive.append(now[0] - seen[0])
            seen = now
        if residency := path.explain().get("residency"):
            budgets.append(residency["budget_nbytes"])
        if group and held:
            others.append(held.take())
            cache = group.use().cache_nbytes
            limit = limited.limit_nbytes if limited else case.limit_nbytes
            if limit is not None:
                cached.append(limit - others[-1])
            if limited:
                limited.follow(others[-1])
        spent = sum(step.seconds for step in steps)
        if case.seconds is not None and spent > case.seconds and len(steps) > _FIRST_STEPS:
            break
    after = group.use().major_faults if group else 0
    explained = path.explain()
    residency = explained.get("residency") or {}
    if group and residency.get("limited_by") == str(group.path):
        residency["limited_by"] = (
            "the memory cgroup of the run"  # its path is gone by the time this is read
        )
    replay.check()
    return Outcome(
        variant=case.variant,
        limit_nbytes=case.limit_nbytes,
        prefill_s=prefill_s,
        steps_s=[step.seconds for step in steps],
        steps_nbytes=[step.read_nbytes for step in steps],
        steps_device_nbytes=from_drive,
        steps_budget_nbytes=budgets,
        prefill_written_nbytes=None if before is None or start is None else start[1] - before[1],
        steps_other_nbytes=others,
        steps_cached_nbytes=cached,
        other_nbytes=max([other, *others]),
        cache_nbytes=cache,
        major_faults=after - faults,
        cpu_s=cpu_s,
        prefill_cpu_s=prefill_cpu_s,
        explained=explained,
    )


class DriveCounters:
    """Bytes that the drive under a folder has read and written so far."""

    def __init__(self, folder: Path) -> None:
        number = os.stat(folder).st_dev
        self._file = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")

    def read(self) -> tuple[int, int] | None:
        """(read, written), or None where the filesystem is not on one block device."""
        words = (read_text(self._file) or "").split()
        # Documentation/block/stat.rst: sectors of 512 bytes, whatever the drive's block size.
        return (int(words[2]) * 512, int(words[6]) * 512) if len(words) > 6 else None


if __name__ == "__main__":
    main({})
