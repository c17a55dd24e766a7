"""`spdk-kv bench decode` and what it shares with bench/dual_blade: load, replay, memory limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spdk_kv.binding.memory_limit import (
    LimitUnavailable,
    MemoryGroup,
    make_group,
    memory_group,
    why_impossible,
)
from spdk_kv.cli import main
from spdk_kv.cli.bench import decode as bench_decode
from spdk_kv.errors import CorruptionError
from spdk_kv.measure.decode.case import (
    Case,
    DriveCounters,
    Outcome,
    outcome_from,
    run_in_subprocess,
)
from spdk_kv.measure.decode.load import Bytes, Load, Noise
from spdk_kv.measure.decode.replay import Replay, SimulatedGpu, StorePath
from spdk_kv.memory.available import read_memory
from support.subprocesses import interruptible_fixture

interruptible = interruptible_fixture
MIB = 1 << 20
SMALL = Load(layers=3, hidden=256, batch=2, prompt=50, generate=5)


def decode(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", "decode", *words])


# --- the load


def test_the_papers_load() -> None:
    load = Load()
    assert (load.units, load.unit_nbytes, load.nbytes) == (32, 64 * MIB, 2048 * MIB)
    assert (load.steps, load.tokens, load.row_nbytes) == (31, 1055, 64 << 10)
    assert load.step_nbytes(0) == load.nbytes
    assert load.step_nbytes(load.steps) == load.capacity_nbytes == load.shape.nbytes


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"layers": 0}, "layers is at least 1"),
        ({"prompt": -1}, "prompt is at least 1"),
        ({"generate": 1}, "one decode step"),
        ({"hidden": 100}, "multiple of 128"),
    ],
)
def test_a_load_is_checked(wrong: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Load(**wrong)


def test_noise_is_of_the_right_size_and_every_unit_has_its_own() -> None:
    noise = Noise(SMALL)
    for steps in (0, 1, SMALL.steps):
        sums = {noise.checksum(unit, steps) for unit in range(SMALL.units)}
        assert len(sums) == SMALL.units
    assert noise.prompt(SMALL.units - 1).nbytes == SMALL.unit_nbytes
    rows = [noise.token(u, s) for u in range(SMALL.units) for s in range(SMALL.steps + 1)]
    assert {row.nbytes for row in rows} == {SMALL.row_nbytes}


# --- the replay


class MemoryPath:
    """Keeps the cache in memory; ``spoil`` may change a unit as it is read."""

    def __init__(self, load: Load, noise: Noise, spoil: Callable[[int, bytearray], None]) -> None:
        self.units = [bytearray() for _ in range(load.units)]
        self.noise, self.spoil = noise, spoil

    def prefill(self) -> None:
        for unit, held in enumerate(self.units):
            held += self.noise.prompt(unit).data

    def step(self, step: int, see: Callable[[int, Bytes], None] | None) -> None:
        import numpy as np

        for unit, held in enumerate(self.units):
            read = bytearray(held)
            self.spoil(unit, read)
            if see is not None and read:
                see(unit, np.frombuffer(read, np.uint8))
            held += self.noise.token(unit, step).data

    def explain(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.units.clear()


def replayed(spoil: Callable[[int, bytearray], None]) -> Replay:
    noise = Noise(SMALL)
    replay = Replay(SMALL, noise, MemoryPath(SMALL, noise, spoil))
    replay.prefill()
    moments = [replay.step() for _ in range(SMALL.steps)]
    assert [one.read_nbytes for one in moments] == [SMALL.step_nbytes(n) for n in range(4)]
    return replay


def test_what_was_stored_passes_the_check() -> None:
    replayed(lambda unit, read: None).check()


def flip(unit: int, read: bytearray) -> None:
    if unit == 4:
        read[-1] ^= 1


def forget_a_row(unit: int, read: bytearray) -> None:
    del read[-SMALL.row_nbytes :]


def leave_out(unit: int, read: bytearray) -> None:
    if unit == 2:
        read.clear()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (flip, "unit 4 as read is not what was stored: CRC32C differs"),
        (forget_a_row, "unit 0 as read"),
        (leave_out, "unit 2 .* not read at all"),
    ],
)
def test_no_path_can_cheat(spoil: Callable[[int, bytearray], None], complaint: str) -> None:
    replay = replayed(spoil)
    with pytest.raises(CorruptionError, match=complaint):
        replay.check()


@pytest.mark.parametrize("residency", ["direct", "pagecache", "adaptive", "paper"])
@pytest.mark.parametrize("link", [None, 1e9])
def test_the_store_replays(tmp_path: Path, residency: str, link: float | None) -> None:
    noise = Noise(SMALL)
    options = {"policy": residency, "memory": SMALL.nbytes // 2}
    gpu = SimulatedGpu(compute_s=1e-4, link_bytes_s=link)
    path = StorePath(SMALL, noise, gpu, f"file://{tmp_path / 'store'}", options)
    try:
        replay = Replay(SMALL, noise, path)
        replay.prefill()
        for _ in range(SMALL.steps):
            replay.step()
        replay.check()
        json.dumps(path.explain())
    finally:
        path.close()


def test_a_link_is_one_queue_per_direction() -> None:
    gpu = SimulatedGpu(link_bytes_s=1000.0)
    first = gpu.copy(500)
    assert gpu.copy(250) == pytest.approx(first + 0.25)
    assert gpu.copy(250, "out") < first
    assert SimulatedGpu().copy(10**12) < first


# --- memory cgroups


@pytest.fixture
def group() -> Any:
    if reason := why_impossible():
        pytest.skip(reason)
    with memory_group() as made:
        yield made
    assert not made.path.exists()


@pytest.mark.machine
def test_a_group_limits_and_counts(group: MemoryGroup, tmp_path: Path) -> None:
    group.forbid_swap()
    group.limit(64 * MIB)
    assert group.use().other_nbytes < MIB
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        "held = bytearray(20 << 20); print(open(sys.argv[2]).read())"
    )
    stat = group.path / "memory.stat"
    done = subprocess.run(
        [sys.executable, "-c", program, str(group.path / "cgroup.procs"), str(stat)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    fields = dict(line.split() for line in done.stdout.split("\n") if line)
    held = int(fields.get("anon", fields.get("rss", 0)))
    assert 20 * MIB <= held < 64 * MIB
    group.limit(None)


@pytest.mark.machine
def test_memory_that_does_not_fit_is_told(group: MemoryGroup, tmp_path: Path) -> None:
    case = Case(
        "direct", str(tmp_path), {"layers": 2, "hidden": 2048, "batch": 8, "prompt": 256},
        group=str(group.path), group_version=group.version, limit_nbytes=8 * MIB,
    )  # fmt: skip
    assert run_in_subprocess(case).error == "killed: its memory did not fit into the limit"


@pytest.mark.machine
def test_x_follows_a_limit_that_changes_in_mid_run(group: MemoryGroup, tmp_path: Path) -> None:
    # What this machine's other programs do to its memory would keep X from rising.
    until = time.monotonic() + 120
    while (read_memory().pressure or 0) > 5 and time.monotonic() < until:
        time.sleep(1)
    case = Case(
        "dual", str(tmp_path), asdict(SMALL), group=str(group.path), group_version=group.version,
        limit_nbytes=1024 * MIB, cache_nbytes=1024 * MIB,
        changes={"1": 512 * MIB, "3": 1024 * MIB},
    )  # fmt: skip
    outcome = run_in_subprocess(case)
    assert not outcome.error
    assert outcome.explained["residency"]["limited_by"] == "the memory cgroup of the run"
    before, halved, still, doubled = outcome.steps_budget_nbytes
    assert halved == pytest.approx(still, rel=0.1)
    assert 0 < halved < 0.6 * min(before, doubled)
    for left, wanted in zip(outcome.steps_cached_nbytes, (1024, 512, 512, 1024), strict=True):
        assert left == pytest.approx(wanted * MIB, rel=0.1)


def test_a_limit_that_the_kernel_refuses(tmp_path: Path) -> None:
    with pytest.raises(LimitUnavailable, match=r"memory\.max"):
        MemoryGroup(tmp_path / "none", 2).limit(1)


def cgroup_tree(root: Path, version: int) -> Path:
    """A root with this process in /a/b; returns the group's folder. No kernel behind it."""
    (root / "proc/self").mkdir(parents=True)
    options = "rw" if version == 2 else "rw,memory"
    kind = "cgroup2" if version == 2 else "cgroup"
    (root / "proc/self/mountinfo").write_text(
        f"30 20 0:25 / /sys/fs/cgroup rw - {kind} {kind} {options}\n"
    )
    line = "0::/a/b" if version == 2 else "4:memory:/a/b\n0::/c"
    (root / "proc/self/cgroup").write_text(line + "\n")
    own = root / "sys/fs/cgroup/a/b"
    own.mkdir(parents=True)
    return own


def test_version_2_makes_it_beside_and_delegates(tmp_path: Path) -> None:
    own = cgroup_tree(tmp_path, 2)
    for folder in (own, own.parent, own.parent.parent):
        (folder / "cgroup.subtree_control").write_text("cpu")
    # Nobody fills the new folder as the kernel would, so it is refused; but where it was tried and
    # what was asked for can be seen.
    with pytest.raises(LimitUnavailable, match=r"no memory\.max"):
        make_group(tmp_path)
    assert (own.parent / "cgroup.subtree_control").read_text() == "+memory"
    assert sorted(entry.name for entry in own.parent.iterdir()) == ["b", "cgroup.subtree_control"]


def test_version_1_makes_it_below(tmp_path: Path) -> None:
    cgroup_tree(tmp_path, 1)
    with pytest.raises(LimitUnavailable, match=r"no memory\.limit_in_bytes"):
        make_group(tmp_path)


def test_no_controller_at_all(tmp_path: Path) -> None:
    with pytest.raises(LimitUnavailable, match="not mounted"):
        make_group(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_group_uses(tmp_path: Path, version: int) -> None:
    prefix = "" if version == 2 else "total_"
    cache = "file" if version == 2 else "cache"
    (tmp_path / "memory.stat").write_text(
        f"{prefix}{cache} 5000\n{prefix}shmem 1000\n{prefix}pgmajfault 7\nodd line\n"
    )
    used = "memory.current" if version == 2 else "memory.usage_in_bytes"
    (tmp_path / used).write_text("9000\n")
    use = MemoryGroup(tmp_path, version).use()
    assert (use.cache_nbytes, use.other_nbytes, use.major_faults) == (4000, 5000, 7)


# --- a case and the command


def test_a_case_that_fails_says_why(tmp_path: Path) -> None:
    case = Case("direct", str(tmp_path / "missing"), {"prompt": 4})
    assert "FileNotFoundError" in run_in_subprocess(case).error


def test_outcomes_of_other_versions_are_read() -> None:
    found = outcome_from({"variant": "dual", "limit_nbytes": None, "unheard_of": 1})
    assert found.variant == "dual"
    assert found.hit_rate is None


def test_outcomes_of_0_1_call_the_budget_the_limit() -> None:
    old = {"limit_nbytes": 3, "budget_nbytes": 5, "units": 2}
    found = outcome_from(
        {
            "variant": "dual", "limit_nbytes": 9, "steps_limit_nbytes": [4, 3],
            "explained": {"residency": old},
        }
    )  # fmt: skip
    assert (found.limit_nbytes, found.steps_budget_nbytes) == (9, [4, 3])
    residency = {"budget_nbytes": 3, "available_nbytes": 5, "units": 2}
    assert found.explained["residency"] == residency


def test_the_first_steps_do_not_count() -> None:
    outcome = Outcome(
        "dual", None, steps_s=[9.0, 8.0, 1.0, 2.0, 4.0], steps_nbytes=[10, 20, 30, 30, 60],
        steps_device_nbytes=[10, 20, 10, 20, 5],
    )  # fmt: skip
    assert (outcome.step_s, outcome.step_nbytes) == (2.0, 40)
    assert outcome.drive_bytes_s == 5.0
    assert outcome.hit_rate == pytest.approx(1 - 35 / 120)
    assert Outcome("dual", None, steps_s=[3.0, 5.0]).step_s == 4.0


def test_counters_of_a_block_device(tmp_path: Path) -> None:
    seen = DriveCounters(tmp_path).read()
    if seen is None:
        pytest.skip(f"{tmp_path} is on no single block device")
    (tmp_path / "file").write_bytes(os.urandom(MIB))
    with (tmp_path / "file").open() as file:
        os.fsync(file.fileno())
    after = DriveCounters(tmp_path).read()
    assert after is not None
    assert after[1] - seen[1] >= MIB


def test_the_fastest_at_each_budget() -> None:
    rows = [
        {"budget_nbytes": budget, "variant": variant, "decode_s_p50": seconds}
        for budget, variant, seconds in ((1, "a", 2.0), (1, "b", 1.0), (2, "a", 1.0), (2, "b", 1.5))
    ]
    assert bench_decode.fastest(rows) == {1: "b", 2: "a"}


@pytest.mark.machine
@pytest.mark.timeout(1200)
def test_a_short_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "_VARIANTS", ("dual",))  # each takes seconds
    result = decode("--dir", str(tmp_path), "--size", "64MiB", "--budget", "80MiB", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["variant"] for row in report["rows"]] == ["dual"]
    assert report["kv_nbytes"] == pytest.approx(64 * MIB, rel=0.02)
    assert report["limited_by"] == ("page_cache=" if why_impossible() else "memory cgroup")
    for row in report["rows"]:
        assert row["steps"] >= 3
        assert row["decode_s_p50"] > 0
    assert report["fastest"].keys() == {str(80 * MIB)}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_no_folder_and_no_process(tmp_path: Path) -> None:
    words = ["-m", "spdk_kv", "bench", "decode", "--dir", str(tmp_path), "--size", "64MiB"]
    process = subprocess.Popen(
        [sys.executable, *words],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not list(tmp_path.glob(".spdk_kv-bench-*/*/*/store")):
            time.sleep(0.01)
        # As a terminal does: to all processes of the group, the measured one too.
        os.killpg(process.pid, signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGKILL), complaints
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_without_cgroups_the_store_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "why_impossible", lambda: "not here")
    monkeypatch.setattr(bench_decode, "_VARIANTS", ("dual",))
    result = decode("--dir", str(tmp_path), "--size", "64MiB", "--budget", "16MiB")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].startswith("page cache not limited (not here)")
    assert [line.split()[3] for line in lines[3:]] == ["dual"]
    assert sum(line.endswith("fastest") for line in lines) == 1


def test_without_a_limit_the_page_cache_runs_once() -> None:
    assert bench_decode.cases_of([1, 2], limited=True) == [
        (budget, name) for budget in (1, 2) for name in ("direct", "pagecache", "dual")
    ]
    assert bench_decode.cases_of([1, 2], limited=False) == [
        (1, "direct"), (1, "dual"), (2, "direct"), (2, "pagecache"), (2, "dual")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--size", "1MiB"), "at least 64.0 MiB"),
        (("--size", "many"), "not a byte count"),
        (("--budget", "-1"), "not a byte count"),
        (("--dir", "/no/such"), "does not exist"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], complaint: str) -> None:
    result = decode(*words)
    assert result.exit_code == 2
    assert complaint in result.output.replace("\n", " ")


def test_a_drive_without_room(tmp_path: Path) -> None:
    result = decode("--dir", str(tmp_path), "--size", "1000000 TiB")
    assert result.exit_code == 1
    assert "no room" in result.output
