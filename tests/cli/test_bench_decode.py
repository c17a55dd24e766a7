"""`spdk-kv bench decode`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spdk_kv.binding.memory_limit import (
    why_impossible,
)
from spdk_kv.cli import main
from spdk_kv.cli.bench import decode as bench_decode
from spdk_kv.measure.decode.load import Load
from support.subprocesses import interruptible_fixture
from support.waiting import PATIENCE_S, wait_until

interruptible = interruptible_fixture
MIB = 1 << 20
SMALL = Load(layers=3, hidden=256, batch=2, prompt=50, generate=5)


def decode(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", "decode", *words])


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


def is_there(group: int) -> bool:
    """Whether the group has a process, be it one that ended and nobody has waited for yet."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


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
        _, complaints = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGKILL), complaints
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not is_there(process.pid), "it left a process")


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
