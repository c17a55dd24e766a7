"""scripts/setup_vfio.py on real devices: what it refuses, what it takes, and the way back.

Whatever it refuses is as it was, to the last bit of its image.
"""

from __future__ import annotations

import json
import re

import pytest

from lab.binding_script import KERNELS, SCRIPT, SITUATIONS, codes, driver, node, setup
from lab.conftest import PATIENCE_S, ROOT

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason=f"{SCRIPT.name} is not there")

SERIAL = "LAB-BIND"
UDEVD = "/lib/systemd/systemd-udevd"
INSTALLED = "/opt/spdk_kv-lab"
UNIT = "/etc/systemd/system/spdk-kv-vfio.service"


@pytest.fixture
def address(lab) -> str:
    """The drive's PCI address; it holds zeros and is the kernel's."""
    found = lab.script("inventory")[SERIAL]
    assert found["driver"] == "nvme"
    wipe(lab)
    return found["address"]


def wipe(lab) -> None:
    """The image is sparse: what is discarded reads as zeros."""
    disk = node(lab, SERIAL)
    # Or the partitions of an earlier test would still be there.
    lab.shell(f"blkdiscard -f {disk} && sync && blockdev --rereadpt {disk}")


def check_refusal(lab, address: str, serial: str, *flags: object) -> set[str]:
    """Asks it to bind; it must refuse and change nothing on any drive. The reasons."""
    before = lab.machine.image_hashes()
    status, answer = setup(lab, "bind", address, serial, "--yes", *flags)
    assert (status, answer["outcome"]) == (2, "refused"), str(answer)
    assert driver(lab, address) == "nvme"
    assert lab.machine.image_hashes() == before
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
        if case.codes & KERNELS:
            told = lab.script("ng_attempt", node(lab, SERIAL))
            assert told["kind"] == "StoreLocked", told
            assert set(re.findall(r"[a-z-]+(?=: )", told["text"])) & case.codes, told
    finally:
        lab.shell(environment + case.undo, check=False)
    if case.after:
        assert check_refusal(lab, address, SERIAL) == case.after


def test_another_drives_serial_is_refused(lab, address):
    assert "serial-mismatch" in check_refusal(lab, address, "LAB-N0")


def test_an_ordinary_user_is_refused(lab, address):
    before = lab.machine.image_hashes()
    command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "python3", SCRIPT]
    for words in (["bind", address, SERIAL, "--yes"], ["restore", address]):
        done = lab.machine.run(*command, *words, "--json", timeout_s=PATIENCE_S)
        assert (done.status, codes(json.loads(done.text("out")))) == (2, {"not-root"}), done.text()
    assert driver(lab, address) == "nvme"
    assert lab.machine.image_hashes() == before


def test_a_drive_that_shares_its_iommu_group_is_refused(lab):
    other = lab.script("inventory")["LAB-TWO1"]["address"]
    assert "iommu-shared" in check_refusal(lab, other, "LAB-TWO1")


def test_a_machine_without_an_iommu_is_refused(lab_without_iommu):
    (drive,) = lab_without_iommu.script("inventory").values()
    assert "no-iommu" in check_refusal(lab_without_iommu, drive["address"], "LAB-N0")


def test_a_free_drive_is_bound_used_and_given_back(lab, address):
    status, answer = setup(lab, "bind", address, SERIAL)
    assert (status, driver(lab, address)) == (0, "nvme"), str(answer)  # a dry run
    before = lab.machine.image_hashes()
    status, answer = setup(lab, "bind", address, SERIAL, "--yes")
    assert (status, driver(lab, address)) == (0, "vfio-pci"), str(answer)
    assert lab.machine.image_hashes() == before
    assert lab.script("io_of_bound", address)["same"]
    status, answer = setup(lab, "restore", address)
    assert (status, driver(lab, address)) == (0, "nvme"), str(answer)
    assert lab.script("kernel_reads", SERIAL, 7)["same"]
    # It holds data now, without a signature.
    assert check_refusal(lab, address, SERIAL) == {"data"}


def test_a_killed_owners_drive_is_restored(lab, address):
    """Its owner is the engine, killed with reads in flight."""
    assert setup(lab, "bind", address, SERIAL, "--yes")[0] == 0
    owner = lab.start("owner", address)
    lab.await_text(owner, "owned")
    status, answer = setup(lab, "restore", address)
    assert status == 2
    assert codes(answer) == {"in-use"}
    assert driver(lab, address) == "vfio-pci"
    lab.machine.link.signal(owner, 9)
    assert lab.machine.link.wait(owner, PATIENCE_S) == -9
    status, answer = setup(lab, "restore", address)
    assert (status, driver(lab, address)) == (0, "nvme"), str(answer)
    assert lab.script("kernel_reads", SERIAL, 5)["same"]


def mode(lab, node: str) -> list[str]:
    """The group and the mode of a device node."""
    return lab.shell(f"stat -c '%G %a' {node}").text().split()


def test_udev_gives_the_group_the_node_when_it_is_made_anew(lab, address):
    if lab.shell(f"test -x {UDEVD} && command -v udevadm", check=False).status:
        pytest.skip("udev is not installed here")
    assert setup(lab, "bind", address, SERIAL, "--yes")[0] == 0
    status, answer = setup(lab, "permissions", "--group", "disk", address)
    assert status == 0, str(answer)
    vfio = answer["vfio_node"]
    assert mode(lab, vfio) == ["disk", "660"]
    lab.shell(f"chown root:root {vfio}; chmod 600 {vfio}; {UDEVD} --daemon")
    try:
        device = f"/sys/devices/virtual/vfio/{vfio.rpartition('/')[2]}"
        lab.shell(f"udevadm trigger --action=add {device} && udevadm settle")
        assert mode(lab, vfio) == ["disk", "660"]
        assert setup(lab, "restore", address)[0] == 0
        assert not lab.shell("ls /run/udev/rules.d").text().strip()
    finally:
        lab.shell("udevadm control --exit")


def test_a_persistent_binding_is_made_again_at_boot(lab, address):
    lab.shell("mkdir -p /run/systemd/system")  # as where systemd runs
    # Installed where only root can write, as --persist demands. A checkout may lie below /tmp.
    lab.shell(f"mkdir -p {INSTALLED} && cp -r {ROOT}/scripts {ROOT}/spdk_kv {INSTALLED}/")
    script = f"{INSTALLED}/scripts/{SCRIPT.name}"
    try:
        status, answer = setup(lab, "bind", address, SERIAL, "--yes", "--persist", script=script)
        assert (status, driver(lab, address)) == (0, "vfio-pci"), str(answer)
        status, answer = setup(lab, "permissions", "--group", "disk", address)
        assert status == 0, str(answer)
        # After a boot the kernel has the drive, and /run is empty.
        lab.give_back(address)
        lab.shell("rm -r /run/spdk_kv /run/udev/rules.d")
        assert driver(lab, address) == "nvme"
        node(lab, SERIAL)
        lab.shell(f"test -e {UNIT.replace('system/', 'system/multi-user.target.wants/')}")
        (start,) = re.findall(r"^ExecStart=(.*)$", lab.shell(f"cat {UNIT}").text(), re.MULTILINE)
        said = lab.shell(start).text()
        assert driver(lab, address) == "vfio-pci", said
        assert mode(lab, answer["vfio_node"]) == ["disk", "660"]
        assert setup(lab, "restore", address)[0] == 0
        assert driver(lab, address) == "nvme"
        lab.shell(f"test ! -e {UNIT} && test ! -e /etc/spdk_kv/persist.json")
    finally:
        lab.shell("rmdir /run/systemd/system")
