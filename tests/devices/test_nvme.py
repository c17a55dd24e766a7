"""NVMe drives are read from sysfs as they are; the trees here mimic the kernel's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdk_kv.devices.mounts import read_mounts
from spdk_kv.devices.nvme import NvmeDrive, list_drives

GIB = 1 << 30


class Machine:
    """A directory that looks like ``/`` of a machine, as far as drives are concerned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mounts: list[str] = []
        self._minor = 0

    def write(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")

    def link(self, path: str, target: str) -> None:
        """Makes ``path`` a relative link to ``target``, as sysfs has them."""
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        (self.root / target).mkdir(parents=True, exist_ok=True)
        up = "../" * (len(Path(path).parts) - 1)
        link.symlink_to(up + target)

    def function(
        self, bdf: str, *, pci_class: str = "0x010802", driver: str | None = None,
        group: str | None = None, numa_node: int = -1,
    ) -> str:  # fmt: skip
        device = f"sys/devices/pci0000:00/{bdf}"
        self.write(f"{device}/class", pci_class)
        self.write(f"{device}/numa_node", str(numa_node))
        self.link(f"sys/bus/pci/devices/{bdf}", device)
        if driver is not None:
            self.link(f"{device}/driver", f"sys/bus/pci/drivers/{driver}")
        if group is not None:
            self.link(f"{device}/iommu_group", f"sys/kernel/iommu_groups/{group}")
            self.link(f"sys/kernel/iommu_groups/{group}/devices/{bdf}", device)
        return device

    def controller(self, device: str, name: str, serial: str) -> str:
        controller = f"{device}/nvme/{name}"
        self.write(f"{controller}/serial", serial.ljust(20))
        self.write(f"{controller}/model", "ACME Fast 1TB".ljust(40))
        self.write(f"{controller}/firmware_rev", "1.2.3   ")
        return controller

    def disk(self, path: str, nbytes: int, block_nbytes: int = 512) -> str:
        """A block device at ``path``; returns its major:minor."""
        self._minor += 1
        number = f"259:{self._minor}"
        self.write(f"{path}/size", str(nbytes // 512))
        self.write(f"{path}/queue/logical_block_size", str(block_nbytes))
        self.write(f"{path}/dev", number)
        self.link(f"sys/class/block/{Path(path).name}", path)
        return number

    def partition(self, disk: str, name: str) -> str:
        self.write(f"{disk}/{name}/partition", "1")
        return self.disk(f"{disk}/{name}", GIB)

    def mount(self, number: str, point: str, source: str, fstype: str = "ext4") -> None:
        self._mounts.append(f"36 1 {number} / {point} rw shared:1 - {fstype} {source} rw")
        self.write("proc/self/mountinfo", "\n".join(self._mounts))

    def drive(self, *, mounted_at: str | None = None) -> NvmeDrive:
        """An ordinary drive with one namespace and one partition, as it is then read."""
        device = self.function("0000:01:00.0", driver="nvme", group="14", numa_node=1)
        controller = self.controller(device, "nvme0", "S1")
        self.disk(f"{controller}/nvme0n1", 1000 * GIB, block_nbytes=4096)
        self.link("sys/class/nvme-generic/ng0n1", f"{controller}/ng0n1")
        number = self.partition(f"{controller}/nvme0n1", "nvme0n1p1")
        if mounted_at is not None:
            self.mount(number, mounted_at, "/dev/nvme0n1p1")
        (drive,) = list_drives(self.root)
        return drive


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_machine_without_sysfs_or_drives_has_none(machine: Machine) -> None:
    assert list_drives(machine.root) == []
    machine.function("0000:00:02.0", pci_class="0x010601", driver="ahci")
    machine.function("0000:00:03.0", pci_class="0x020000")
    assert list_drives(machine.root) == []


def test_free_drive_is_described_whole(machine: Machine) -> None:
    drive = machine.drive()
    assert (drive.bdf, drive.serial, drive.model) == ("0000:01:00.0", "S1", "ACME Fast 1TB")
    assert (drive.firmware, drive.driver, drive.numa_node) == ("1.2.3", "nvme", 1)
    assert (drive.iommu_group, drive.iommu_group_members) == ("14", ("0000:01:00.0",))
    assert not drive.shares_iommu_group
    assert not drive.mounted
    (namespace,) = drive.namespaces
    assert (namespace.block_node, namespace.generic_node) == ("/dev/nvme0n1", "/dev/ng0n1")
    # `size` counts 512-byte sectors although the LBA size is 4096.
    assert namespace.nbytes == drive.nbytes == 1000 * GIB
    assert namespace.block_nbytes == 4096
    assert namespace.partitions == ("nvme0n1p1",)
    assert namespace.holders == ()


def test_mounted_partition_makes_the_drive_mounted(machine: Machine) -> None:
    machine.mount("8:1", "/", "/dev/sda1")
    drive = machine.drive(mounted_at="/mnt/with\\040space")
    assert drive.mounted
    assert drive.mount_points == ("/mnt/with space",)


def test_mount_through_lvm_on_luks_is_found(machine: Machine) -> None:
    machine.drive()
    machine.disk("sys/devices/virtual/block/dm-0", GIB)
    lvm = machine.disk("sys/devices/virtual/block/dm-1", GIB)
    part = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p1"
    machine.link(f"{part}/holders/dm-0", "sys/devices/virtual/block/dm-0")
    machine.link("sys/devices/virtual/block/dm-0/holders/dm-1", "sys/devices/virtual/block/dm-1")
    (drive,) = list_drives(machine.root)
    assert drive.namespaces[0].holders == ("dm-0", "dm-1")
    assert not drive.mounted
    machine.mount(lvm, "/home", "/dev/mapper/vg-home")
    (drive,) = list_drives(machine.root)
    assert drive.mount_points == ("/home",)


def test_btrfs_is_found_by_name_as_its_device_number_is_its_own(machine: Machine) -> None:
    machine.mount("0:33", "/data", "/dev/nvme0n1p1", "btrfs")
    assert machine.drive().mount_points == ("/data",)


def test_btrfs_on_device_mapper_is_found_by_its_mapped_name(machine: Machine) -> None:
    machine.mount("0:33", "/data", "/dev/mapper/luks-1", "btrfs")
    machine.drive()
    machine.disk("sys/devices/virtual/block/dm-0", GIB)
    machine.write("sys/devices/virtual/block/dm-0/dm/name", "luks-1")
    disk = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1"
    machine.link(f"{disk}/holders/dm-0", "sys/devices/virtual/block/dm-0")
    (drive,) = list_drives(machine.root)
    assert drive.mount_points == ("/data",)


def test_mount_of_another_drive_is_not_ours(machine: Machine) -> None:
    machine.mount("259:77", "/other", "/dev/nvme0n11")
    assert not machine.drive().mounted


def test_shared_iommu_group_names_all_members(machine: Machine) -> None:
    machine.function("0000:01:00.0", driver="nvme", group="7")
    machine.function("0000:01:00.1", pci_class="0x020000", group="7")
    (drive,) = list_drives(machine.root)
    assert drive.iommu_group_members == ("0000:01:00.0", "0000:01:00.1")
    assert drive.shares_iommu_group


def test_drive_at_vfio_keeps_its_address_and_loses_its_identity(machine: Machine) -> None:
    machine.function("0000:02:00.0", driver="vfio-pci", group="9")
    (drive,) = list_drives(machine.root)
    assert (drive.driver, drive.serial, drive.model, drive.nbytes) == ("vfio-pci", None, None, None)
    assert drive.namespaces == ()


def test_drive_without_driver_iommu_or_numa_node(machine: Machine) -> None:
    machine.function("0000:02:00.0", numa_node=-1)
    (drive,) = list_drives(machine.root)
    assert (drive.driver, drive.iommu_group, drive.numa_node) == (None, None, None)
    assert drive.iommu_group_members == ()
    assert not drive.shares_iommu_group


def test_multipath_namespace_is_named_by_its_disk(machine: Machine) -> None:
    device = machine.function("0000:01:00.0", driver="nvme")
    controller = machine.controller(device, "nvme3", "S3")
    machine.write(f"{controller}/nvme1c3n1/size", "8")  # the hidden path, with no node in /dev
    number = machine.disk("sys/devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1", 5 * GIB)
    machine.mount(number, "/kv", "/dev/nvme1n1")
    (drive,) = list_drives(machine.root)
    (namespace,) = drive.namespaces
    assert (namespace.name, namespace.nbytes) == ("nvme1n1", 5 * GIB)
    assert drive.mount_points == ("/kv",)


def test_namespace_that_the_kernel_cannot_make_a_disk_of(machine: Machine) -> None:
    device = machine.function("0000:01:00.0", driver="nvme")
    controller = machine.controller(device, "nvme0", "S1")
    machine.link("sys/class/nvme-generic/ng0n2", f"{controller}/ng0n2")
    (drive,) = list_drives(machine.root)
    (namespace,) = drive.namespaces
    assert (namespace.block_node, namespace.generic_node) == (None, "/dev/ng0n2")
    assert drive.nbytes is None


def test_mounts_skip_nonsense_lines(machine: Machine) -> None:
    machine.write(
        "proc/self/mountinfo",
        "\nnonsense\n1 2 8:1 / - ext4\n36 1 8:1 /sub\\134x /m rw - ext4 /dev/sda1 rw,errors=x",
    )
    (mount,) = read_mounts(machine.root)
    assert (mount.device, mount.root, mount.mount_point) == ("8:1", "/sub\\x", "/m")
    assert (mount.fstype, mount.source, mount.options) == ("ext4", "/dev/sda1", ("rw", "errors=x"))
