"""scripts/setup_vfio.py on real devices: what it refuses, what it takes, and the way back.

Whatever it refuses is as it was, to the last bit of its image.
"""

from __future__ import annotations

import pytest
from binding import SCRIPT, SITUATIONS, codes, node, setup

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason=f"{SCRIPT.name} is not there")

SERIAL = "LAB-BIND"


@pytest.fixture
def address(lab) -> str:
    """The drive's PCI address; it holds zeros and is the kernel's."""
    found = lab.script("inventory")[SERIAL]
    assert found["driver"] == "nvme"
    wipe(lab)
    return found["address"]


def wipe(lab) -> None:
    """The image is sparse: what is discarded reads as zeros."""
    lab.shell(f"blkdiscard -f {node(lab, SERIAL)} && sync")


def driver(lab, address: str) -> str:
    return lab.shell(f"basename $(readlink /sys/bus/pci/devices/{address}/driver)").text().strip()


def check_refusal(lab, address: str, serial: str, *flags: object) -> set[str]:
    """Asks it to bind; it must refuse and change nothing. The reasons."""
    name = serial.removeprefix("LAB-").lower()
    before = lab.machine.image_hash(name)
    status, answer = setup(lab, "bind", address, serial, "--yes", *flags)
    assert (status, answer["outcome"]) == (2, "refused"), str(answer)
    assert driver(lab, address) == "nvme"
    assert lab.machine.image_hash(name) == before
    return codes(answer)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_drive_in_use_is_refused_and_left_as_it_is(lab, address, name):
    case = SITUATIONS[name]
    if lab.shell(f"command -v {case.tool}", check=False).status:
        pytest.skip(f"{case.tool} is not installed here")
    environment = f"D={node(lab, SERIAL)}; export D; "
    lab.shell(f"set -e; {environment}{case.make}; sync")
    try:
        found = check_refusal(lab, address, SERIAL)
        assert case.codes <= found, found
        if "signature" not in case.codes and "data" not in case.codes:
            # No flag makes it take a drive that is in use.
            again = check_refusal(lab, address, SERIAL, "--i-know-this-destroys", SERIAL)
            assert case.codes <= again
    finally:
        lab.shell(environment + case.undo, check=False)


def test_another_drives_serial_is_refused(lab, address):
    before = lab.machine.image_hash("bind")
    status, answer = setup(lab, "bind", address, "LAB-N0", "--yes")
    assert status == 2
    assert "serial-mismatch" in codes(answer)
    assert driver(lab, address) == "nvme"
    assert lab.machine.image_hash("bind") == before


def test_a_drive_that_shares_its_iommu_group_is_refused(lab):
    other = lab.script("inventory")["LAB-TWO1"]["address"]
    assert "iommu-shared" in check_refusal(lab, other, "LAB-TWO1")


def test_a_machine_without_an_iommu_is_refused(lab_without_iommu):
    (drive,) = lab_without_iommu.script("inventory").values()
    assert "no-iommu" in check_refusal(lab_without_iommu, drive["address"], "LAB-N0")


def test_a_free_drive_is_bound_used_and_given_back(lab, address):
    status, answer = setup(lab, "bind", address, SERIAL)
    assert (status, driver(lab, address)) == (0, "nvme"), str(answer)  # a dry run
    before = lab.machine.image_hash("bind")
    status, answer = setup(lab, "bind", address, SERIAL, "--yes")
    assert (status, driver(lab, address)) == (0, "vfio-pci"), str(answer)
    assert lab.machine.image_hash("bind") == before
    assert lab.script("io_of_bound", address)["same"]
    status, answer = setup(lab, "restore", address)
    assert (status, driver(lab, address)) == (0, "nvme"), str(answer)
    assert lab.script("kernel_reads", SERIAL)["same"]
    # It holds data now, without a signature.
    assert check_refusal(lab, address, SERIAL) == {"data"}


def test_a_killed_owners_drive_is_restored(lab, address):
    assert setup(lab, "bind", address, SERIAL, "--yes")[0] == 0
    lab.shell(f"sleep 600 <>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{address}"
              "/iommu_group)) >/dev/null 2>&1 & echo $! >/run/holder")  # fmt: skip
    status, answer = setup(lab, "restore", address)
    assert status == 2
    assert codes(answer) == {"in-use"}
    assert driver(lab, address) == "vfio-pci"
    lab.shell("kill -9 $(cat /run/holder)")
    status, answer = setup(lab, "restore", address)
    assert (status, driver(lab, address)) == (0, "nvme"), str(answer)
