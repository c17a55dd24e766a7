"""--i-know-this-destroys: only for the list that was shown, and for nothing but contents."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from binding.machine import BDF, GROUP, MIB, SERIAL, Machine, codes


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def with_ext4(machine: Machine) -> None:
    subprocess.run(["/sbin/mkfs.ext4", "-q", machine.root / "dev/nvme0n1"], check=True)


def test_contents_go_only_after_their_list_was_shown(machine: Machine) -> None:
    with_ext4(machine)
    first = machine.bind(destroys=SERIAL)
    assert (first.status, codes(first)) == (2, {"signature", "not-shown"})
    assert "ext4" in first.text()
    assert machine.kernel.log == []
    media = machine.media()
    assert machine.bind(destroys=SERIAL).status == 0
    after = machine.media()
    assert after["nvme0n1"] == media["nvme0n1"]  # bind erases nothing


def test_refusal_without_the_flag_counts_as_shown(machine: Machine) -> None:
    with_ext4(machine)
    refused = machine.bind(yes=False)
    assert (refused.status, codes(refused)) == (2, {"signature"})
    assert f"--i-know-this-destroys {SERIAL}" in refused.text()
    assert machine.bind(yes=False, destroys=SERIAL).status == 0
    assert machine.driver_name() == "nvme"


@pytest.mark.parametrize("change", ["contents", "boot", "serial"])
def test_list_shown_of_something_else_does_not_count(machine: Machine, change: str) -> None:
    with_ext4(machine)
    machine.bind()
    serial = SERIAL
    if change == "contents":
        with_ext4(machine)  # another UUID
    elif change == "boot":
        machine.write("proc/sys/kernel/random/boot_id", "boot-two")
    else:
        serial = "S9"
        machine.write(f"{machine.controller}/serial", serial)
    report = machine.tool().bind(BDF, serial, yes=True, destroys=serial)
    assert codes(report) == {"signature", "not-shown"}


def test_flag_must_name_the_same_serial(machine: Machine) -> None:
    with_ext4(machine)
    machine.bind()
    assert codes(machine.bind(destroys="OTHER")) == {"serial-mismatch"}


@pytest.mark.parametrize("use", ["fstab", "mount", "shared"])
def test_flag_lifts_nothing_but_contents(machine: Machine, use: str) -> None:
    with_ext4(machine)
    machine.bind()
    if use == "fstab":
        machine.write("etc/fstab", "/dev/nvme0n1 /data ext4 noauto")
    elif use == "mount":
        machine.mount("proc/1/task/1", "259:1", "/data", "/dev/nvme0n1")
    else:
        machine.link(f"sys/kernel/iommu_groups/{GROUP}/devices/0000:01:00.1", "sys/x")
    report = machine.bind(destroys=SERIAL)
    assert report.status == 2
    assert codes(report) & {"configured", "mounted", "iommu-shared"}
    assert machine.kernel.log == []


def test_own_store_is_named_as_such(machine: Machine) -> None:
    with (machine.root / "dev/nvme0n1").open("r+b") as file:
        file.write(b"spdk_kv\0" + b"\1" * MIB)
    report = machine.bind()
    assert codes(report) == {"data"}
    assert "a store of spdk_kv" in report.text()
