"""lab.py itself: what it returns, and that nothing of it outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.binding_script import SITUATIONS
from lab.conftest import PATIENCE_S, ROOT
from labkit.needs import TEST_TOOLS
from support.subprocesses import interruptible_fixture

interruptible = interruptible_fixture
LAB = [sys.executable, str(ROOT / "vagrant" / "lab.py")]


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started, from all of its threads."""
    return [
        int(child)
        for listed in Path(f"/proc/{pid}/task").glob("*/children")
        for child in listed.read_text().split()
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_inside_gives_its_output_and_status():
    inside = "echo to out; echo to err >&2; cat /sys/class/nvme/nvme0/serial; exit 7"
    options = ["--drive", "x,serial=ABC,mib=16", "--hugepages-mib", "0"]
    done = subprocess.run(
        [*LAB, "run", *options, "--", "sh", "-c", inside],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == ["to out", "ABC"]
    assert "to err" in done.stderr


def test_check_names_every_tool_that_a_test_may_be_skipped_for():
    asked_for = {case.tool for case in SITUATIONS.values()} - {"sh", "busybox"}
    assert asked_for <= {*TEST_TOOLS.values()}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_machine_ends_with_lab_py_however_that_ends(number, tmp_path):
    env = os.environ | {"SPDK_KV_LAB_ACCEL": "tcg", "TMPDIR": str(tmp_path)}
    lab = subprocess.Popen([*LAB, "run", "--", "sleep", "600"], env=env, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE_S
        # The control socket is there once QEMU runs.
        while not list(tmp_path.glob("*/qmp")):
            assert time.monotonic() < until
            assert lab.poll() is None
            time.sleep(0.1)
        (qemu,) = children(lab.pid)
        lab.send_signal(number)
        lab.wait(PATIENCE_S)
    finally:
        lab.kill()
        lab.wait()
    for _ in range(600):
        if not alive(qemu):
            break
        time.sleep(0.1)
    assert not alive(qemu)
    # Whoever is killed cannot clear up.
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())
