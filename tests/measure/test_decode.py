"""A decode that is replayed: its load, its check, its cases and their outcomes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from binding.groups import group_fixture
from spdk_kv.binding.memory_limit import MemoryGroup
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
from support.waiting import PATIENCE_S

group = group_fixture
MIB = 1 << 20
SMALL = Load(layers=3, hidden=256, batch=2, prompt=50, generate=5)


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


# --- a case and its outcome


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
    until = time.monotonic() + PATIENCE_S
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
