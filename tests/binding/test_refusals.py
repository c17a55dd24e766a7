"""Every condition under which a drive is not taken, each made in a tree that really has it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from binding import cases_more  # noqa: F401  (adds its cases)
from binding.cases_use import CASES, DISK
from binding.machine import SERIAL, Machine, codes
from spdk_kv.devices.inspection.reasons import Code


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("expected", "make"), [pytest.param(c, make, id=name) for name, c, make in CASES]
)
def test_drive_is_refused_and_untouched(
    machine: Machine, expected: set[str], make: Callable[[Machine], object]
) -> None:
    make(machine)
    media = {} if os.path.getsize(machine.root / "dev/nvme0n1") > 1 << 30 else machine.media()
    driver = machine.driver_name()
    report = machine.bind()
    assert (codes(report), report.status) == (expected, 2), report.text()
    assert machine.kernel.log == []
    assert machine.driver_name() == driver
    assert machine.record() is None
    if media:
        assert machine.media() == media


def test_every_reason_that_a_drive_can_give_has_a_case() -> None:
    elsewhere = {"not-shown", "busy", "unfinished", "not-ours", "in-use", "not-possible"}
    assert {code for _, expected, _ in CASES for code in expected} | elsewhere == {
        code.value for code in Code
    }


def test_drive_that_nothing_uses_is_not_refused(machine: Machine) -> None:
    machine.write("etc/fstab", "/dev/sda1 / ext4\nUUID=ffff-0000 /boot vfat\n#/dev/nvme0n1 /old x")
    machine.write("proc/cmdline", "root=/dev/sda1 resume=8:2 console=ttyS0")
    machine.symlink(f"{machine.process('77', 'dd')}/fd/3", "/dev/nvme0n11")
    machine.mount("proc/1/task/1", "259:77", "/other", "/dev/nvme1n1")
    machine.write("proc/swaps", "Filename\n/dev/sda2 partition\t1\t0\t-2")
    report = machine.bind(yes=False)
    assert (report.status, codes(report)) == (0, set()), report.text()


@pytest.mark.parametrize("bdf", ["01:00.0", "all", "*", "0000:01:00.*", "0000:01:00.0 ", ""])
def test_only_one_full_address_is_taken(machine: Machine, bdf: str) -> None:
    report = machine.tool().bind(bdf, SERIAL, yes=True)
    assert (report.status, codes(report)) == (2, {"not-found"})


def test_drive_in_use_is_neither_opened_nor_looked_into(machine: Machine) -> None:
    machine.holder("md0", DISK)
    machine.kernel.claimed.add("nvme0n1")  # an attempt would add open-exclusive
    assert codes(machine.bind()) == {"holder"}
    assert machine.kernel.commands == []
