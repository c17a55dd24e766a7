"""A drive on vfio-pci, driven by the engine in a whole PC, and then the kernel's again."""

from __future__ import annotations

import pytest


def test_the_guest_sees_its_drives_each_with_its_iommu_group(lab):
    drives = lab.script("inventory")
    # Those that test_removal.py takes out may be gone by now.
    there = {drive.serial: drive.block_nbytes for drive in lab.machine.hardware.drives}
    for lost in {"LAB-PULL", "LAB-CUT"} - set(drives):
        del there[lost]
    assert {serial: drive["block_nbytes"] for serial, drive in drives.items()} == there
    alone = [drive["group"] for name, drive in drives.items() if not name.startswith("LAB-TWO")]
    assert len(set(alone)) == len(alone)
    assert None not in alone
    assert drives["LAB-TWO0"]["group"] == drives["LAB-TWO1"]["group"]
    assert {drive["driver"] for drive in drives.values()} == {"nvme"}


@pytest.mark.parametrize(("serial", "block_nbytes"), [("LAB-N0", 512), ("LAB-N1", 4096)])
def test_the_engine_and_the_kernel_read_what_the_other_wrote(lab, serial, block_nbytes):
    told = lab.script("first_io", serial)
    assert told["taken"] == "vfio-pci"
    assert told["given"] == "nvme"
    assert told["kernel_reads_the_same"]
    assert told["facts"]["serial"] == serial
    assert told["facts"]["block_nbytes"] == block_nbytes
    assert told["facts"]["nbytes"] == lab.machine.drive(serial[4:].lower()).nbytes
    assert told["health"]["media_errors"] == 0


def test_a_machine_without_an_iommu_has_no_groups(lab_without_iommu):
    (drive,) = lab_without_iommu.script("inventory").values()
    assert drive["group"] is None
