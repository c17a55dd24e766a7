"""Engine `ng` in the lab's kernel: the contract, stores, and what it refuses or loses."""

from __future__ import annotations

import re
import sys

from lab.binding_script import node
from lab.conftest import HERE, PATIENCE_S, ROOT
from lab.test_ownership import as_user
from lab.test_removal import check

# Of guest_ng_suite.py: the contract and the stores on two drives, the rest once.
LEAST_PASSED = 30


def test_the_engine_contract_and_stores(lab):
    """guest_ng_suite.py, all of it in one process: Python's start is what takes long in there."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--timeout", str(PATIENCE_S)]
    command.append(str(HERE / "guest" / "ng_suite.py"))
    running = lab.machine.link.start(command, env=lab.env, cwd="/tmp")
    status = lab.machine.link.wait(running, 3 * PATIENCE_S)
    said = running.text()
    assert not running.timed_out, said
    assert status == 0, said
    (passed,) = re.findall(r"(\d+) passed", said)
    assert int(passed) >= LEAST_PASSED, said
    assert "skipped" not in said, said


def test_a_drive_taken_from_its_driver_under_load_is_gone(lab):
    # Not by its slot: Linux 6.1 was seen to stumble over the end of whoever has a generic node
    # open when its card is out.
    reading = lab.start("reading", "LAB-NGGO", "ng")
    lab.await_text(reading, "reading")
    address = reading.text("out").split()[1]
    lab.shell(f"echo {address} >/sys/bus/pci/devices/{address}/driver/unbind")
    check(lab.answer(reading))
    lab.shell(f"echo {address} >/sys/bus/pci/drivers/nvme/bind")
    told = lab.script("ng_attempt", node(lab, "LAB-NGGO"))
    assert told["kind"] == "opened", told


def test_an_ordinary_user_is_told_what_he_lacks(lab):
    """Before Linux 6.2 he lacks CAP_SYS_ADMIN whatever the modes say; later the modes suffice."""
    disk = node(lab, "LAB-N1")
    generic = disk.replace("/nvme", "/ng")
    answers = []
    for mode in ("600", "666"):
        lab.shell(f"chmod {mode} {disk} {generic}")
        answers.append(as_user(lab, "ng_attempt", disk))
    lab.shell(f"chmod 600 {disk} {generic}")
    assert answers[0]["kind"] == "EngineUnavailable", answers
    assert generic in answers[0]["text"]
    kernel = lab.shell("uname -r").text().split(".")
    if tuple(map(int, kernel[:2])) < (6, 2):
        assert answers[1]["kind"] == "EngineUnavailable", answers
        assert "CAP_SYS_ADMIN" in answers[1]["text"]
    else:
        assert answers[1]["kind"] == "opened", answers
