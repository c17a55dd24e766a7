"""One case of the decode measurements: one path at one memory limit, in a process of its own.

    python -m spdk_kv.measure.decode.case '{"variant": "dual", "folder": "/mnt/kv", ...}'

The case is the JSON of a :class:`Case`; the outcome, an :class:`Outcome`, is printed as JSON. A
process of its own, because a memory limit is one of a process, and what one path leaves in memory
must not help or hurt the next.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from spdk_kv.binding import MemoryGroup, drop_page_cache
from spdk_kv.devices import read_text
from spdk_kv.errors import SpdkKvError
from spdk_kv.measure.decode.load import Load, Noise
from spdk_kv.measure.decode.replay import Device, KVPath, Moment, Replay, StorePath
from spdk_kv.measure.touch_memory import touch_free_memory

# Variant -> fields of PageCacheOptions. All other settings but hugepages are the defaults.
STORE_VARIANTS: dict[str, dict[str, Any]] = {
    "direct": {"policy": "direct"},
    "pagecache": {"policy": "pagecache"},
    "paper": {"policy": "paper"},
    "dual": {"policy": "adaptive"},
}

# Decode steps in which a path finds its place: units are promoted, and buffers are made.
_FIRST_STEPS = 2

_WARM_UP = {"layers": 3, "hidden": 256, "batch": 2, "prompt": 64, "generate": 3}

Maker = Callable[["Case", Noise, Device, Path], KVPath]


@dataclass(frozen=True)
class Case:
    """``folder``: on the drive to be measured. ``group``: path of a memory cgroup to go into
    (empty: none), ``group_version`` of it, ``limit_nbytes`` its limit (None: none).
    ``options``: more fields of :class:`spdk_kv.PageCacheOptions`; ``ahead``: layers read ahead of
    the one in use.
    ``drop_caches``: the machine's page cache is emptied first (needs root). ``seconds``: no further
    step is begun after so many, once there were three. ``changes``: step -> the limit from that
    step on."""

    variant: str
    folder: str
    load: dict[str, int]
    group: str = ""
    group_version: int = 2
    limit_nbytes: int | None = None
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
    """Seconds, bytes, and counts of the decode steps alone unless the name says prefill.

    ``steps_nbytes``: what each step wanted to read; ``steps_device_nbytes``: what came from the
    block device meanwhile (empty where it has no counters); ``steps_limit_nbytes``: what the store
    let the page cache hold after each (empty for other paths). ``other_nbytes``: the most
    anonymous, pinned and kernel memory seen after a step (0 without a group). ``cpu_s``: all
    threads of the process, not the kernel's own. ``error``: why there is nothing else.
    """

    variant: str
    limit_nbytes: int | None
    prefill_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    steps_nbytes: list[int] = field(default_factory=list)
    steps_device_nbytes: list[int] = field(default_factory=list)
    steps_limit_nbytes: list[int] = field(default_factory=list)
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
        """The steps after the first two, of which the other properties are; all where there are no
        others."""
        return slice(_FIRST_STEPS if len(self.steps_s) > _FIRST_STEPS else 0, None)

    @property
    def step_s(self) -> float:
        """The median step."""
        return statistics.median(self.steps_s[self.later])

    @property
    def step_nbytes(self) -> float:
        """What a step wanted to read, on average."""
        return statistics.fmean(self.steps_nbytes[self.later])

    @property
    def device_bytes_s(self) -> float | None:
        """What the block device gave per second."""
        if not self.steps_device_nbytes:
            return None
        return sum(self.steps_device_nbytes[self.later]) / sum(self.steps_s[self.later])

    @property
    def hit_rate(self) -> float | None:
        """Share of the bytes asked for that the device did not have to give."""
        if not self.steps_device_nbytes:
            return None
        asked = sum(self.steps_nbytes[self.later])
        return max(0.0, 1.0 - sum(self.steps_device_nbytes[self.later]) / asked)


def run_apart(case: Case, module: str | Path = "spdk_kv.measure.decode.case") -> Outcome:
    """Runs ``case`` in a new process (``module``: this one, or a script that calls :func:`main`).
    Blocks. What goes wrong in there comes back as ``error``; nothing is left in the folder,
    interrupted or not."""
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
    """Exit status and both outputs; the process has ended when this returns or raises."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, complaints = process.communicate()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process.returncode, output, complaints


def outcome_from(found: Mapping[str, Any]) -> Outcome:
    """An outcome from its JSON; fields of another version are left out."""
    known = {one.name for one in fields(Outcome)}
    return Outcome(**{name: value for name, value in found.items() if name in known})


def main(makers: Mapping[str, Maker]) -> None:
    """The process that :func:`run_apart` starts. ``makers``: more variants than the store's."""
    # Ctrl-C is for the process that waits for this one, ends it, and clears up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    case = Case(**json.loads(sys.argv[1]))
    try:
        outcome = _run(case, makers)
    except (SpdkKvError, OSError, ValueError) as failed:
        sys.exit(f"{type(failed).__name__}: {failed}")
    print(json.dumps(asdict(outcome)))


def _run(case: Case, makers: Mapping[str, Maker]) -> Outcome:
    import torch  # noqa: F401 - before the limit: its code is not part of what is measured

    import spdk_kv.store  # noqa: F401

    load = Load(**case.load)
    if case.drop_caches:
        drop_page_cache()
    with _path(replace(case, load=_WARM_UP), makers) as (replay, _):
        # Code, not data: it would be read from the disk again and charged to the group.
        replay.prefill()
        replay.step()
        replay.check()
    touch_free_memory(case.limit_nbytes or load.capacity_nbytes)
    group = MemoryGroup(Path(case.group), case.group_version) if case.group else None
    if group is not None:
        group.limit(case.limit_nbytes)
        group.add(os.getpid())
    with _path(case, makers) as (replay, path):
        return _measure(case, load, replay, path, group)


@contextmanager
def _path(case: Case, makers: Mapping[str, Maker]) -> Iterator[tuple[Replay, KVPath]]:
    load = Load(**case.load)
    with tempfile.TemporaryDirectory(prefix="decode-", dir=case.folder) as folder:
        noise = Noise(load)
        make = makers.get(case.variant, _make_store)
        path = make(case, noise, Device(case.compute_s, case.link_bytes_s), Path(folder))
        try:
            yield Replay(load, noise, path), path
        finally:
            path.close()


def _make_store(case: Case, noise: Noise, device: Device, folder: Path) -> KVPath:
    options = {**STORE_VARIANTS[case.variant], **case.options}
    location = f"file://{folder / 'store'}"
    return StorePath(Load(**case.load), noise, device, location, options, case.ahead)


def _measure(
    case: Case, load: Load, replay: Replay, path: KVPath, group: MemoryGroup | None
) -> Outcome:
    counters = DeviceCounters(Path(case.folder))
    before = counters.read()
    cpu = time.process_time()
    prefill_s = replay.prefill()
    prefill_cpu_s = time.process_time() - cpu
    start = seen = counters.read()
    faults = group.use().major_faults if group else 0
    cpu_s, other, cache = 0.0, 0, 0
    moments: list[Moment] = []
    from_device: list[int] = []
    limits: list[int] = []
    while len(moments) < load.steps:
        if group and (limit := case.changes.get(str(len(moments)))) is not None:
            group.limit(limit)
        cpu = time.process_time()
        moments.append(replay.step())
        cpu_s += time.process_time() - cpu
        if seen and (now := counters.read()):
            from_device.append(now[0] - seen[0])
            seen = now
        if residency := path.explain().get("residency"):
            limits.append(residency["limit_nbytes"])
        if group:
            use = group.use()
            other, cache = max(other, use.other_nbytes), use.cache_nbytes
        spent = sum(moment.seconds for moment in moments)
        if case.seconds is not None and spent > case.seconds and len(moments) > _FIRST_STEPS:
            break
    after = group.use().major_faults if group else 0
    explained = path.explain()
    residency = explained.get("residency") or {}
    if group and residency.get("limited_by") == str(group.path):
        residency["limited_by"] = "the memory cgroup of the run"  # gone by the time this is read
    replay.check()
    return Outcome(
        variant=case.variant,
        limit_nbytes=case.limit_nbytes,
        prefill_s=prefill_s,
        steps_s=[moment.seconds for moment in moments],
        steps_nbytes=[moment.read_nbytes for moment in moments],
        steps_device_nbytes=from_device,
        steps_limit_nbytes=limits,
        prefill_written_nbytes=None if before is None or start is None else start[1] - before[1],
        other_nbytes=other,
        cache_nbytes=cache,
        major_faults=after - faults,
        cpu_s=cpu_s,
        prefill_cpu_s=prefill_cpu_s,
        explained=explained,
    )


class DeviceCounters:
    """Bytes that the block device under a folder has read and written since it was there."""

    def __init__(self, folder: Path) -> None:
        number = os.stat(folder).st_dev
        self._file = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")

    def read(self) -> tuple[int, int] | None:
        """(read, written), or None where the filesystem is on no single block device."""
        words = (read_text(self._file) or "").split()
        # Documentation/block/stat.rst: sectors of 512 bytes, whatever the device's are.
        return (int(words[2]) * 512, int(words[6]) * 512) if len(words) > 6 else None


if __name__ == "__main__":
    main({})
