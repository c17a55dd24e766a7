"""NVMe PCI functions and their namespaces, as sysfs shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices.mounts import Mount, read_mounts
from spdk_kv.devices.sysfs import entries, exists, link_name, read_count, read_text

# PCI Code and ID Assignment Specification: base class 01h (mass storage), sub-class 08h (NVM).
_NVM_CLASS = "0x0108"
# With native multipath a controller shows the hidden path nvme0c1n1; the disk is nvme0n1.
_NAMESPACE = re.compile(r"(?:nvme|ng)(\d+)(?:c\d+)?n(\d+)")
# sysfs counts `size` in sectors of 512 bytes, whatever the drive's LBA size.
_SECTOR_NBYTES = 512


@dataclass(frozen=True)
class Namespace:
    """One namespace that the kernel drives.

    Attributes:
        block_node, generic_node: its nodes under /dev; None where the kernel made none.
        nbytes: its size.
        block_nbytes: its logical block size.
        holders: dm and md devices on it or its partitions, at any depth.
        mount_points: where it, a partition or a holder is mounted, as this process sees it. A btrfs
            of several drives shows up on only one of them.
    """

    name: str
    block_node: str | None
    generic_node: str | None
    nbytes: int | None
    block_nbytes: int | None
    partitions: tuple[str, ...]
    holders: tuple[str, ...]
    mount_points: tuple[str, ...]


@dataclass(frozen=True)
class NvmeDrive:
    """One NVMe PCI function.

    ``serial``, ``model``, ``firmware`` and ``namespaces`` are known only while the kernel's nvme
    driver has it.

    Attributes:
        bdf: its PCI address, such as 0000:01:00.0.
        driver: the driver that has it; None for none.
        iommu_group_members: BDFs of all functions in its IOMMU group, itself included.
        numa_node: None on a machine without NUMA.
    """

    bdf: str
    serial: str | None
    model: str | None
    firmware: str | None
    driver: str | None
    iommu_group: str | None
    iommu_group_members: tuple[str, ...]
    numa_node: int | None
    namespaces: tuple[Namespace, ...]

    @property
    def nbytes(self) -> int | None:
        """Bytes of all namespaces together; None where any size is unknown, or there are none."""
        sizes = [namespace.nbytes for namespace in self.namespaces]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None

    @property
    def mount_points(self) -> tuple[str, ...]:
        """Where anything on the drive is mounted."""
        return tuple(sorted({point for ns in self.namespaces for point in ns.mount_points}))

    @property
    def mounted(self) -> bool:
        """Whether anything on the drive is mounted. A drive that is not may still have holders."""
        return bool(self.mount_points)

    @property
    def shares_iommu_group(self) -> bool:
        """Whether taking this drive for VFIO would take other PCI functions with it."""
        return any(member != self.bdf for member in self.iommu_group_members)


def list_drives(root: Path = Path("/")) -> list[NvmeDrive]:
    """Every NVMe PCI function, by BDF. Reads only sysfs, so it never waits for a drive."""
    functions = root / "sys/bus/pci/devices"
    mounts = read_mounts(root)
    return [
        _read_drive(root, functions / bdf, mounts)
        for bdf in entries(functions)
        if (read_text(functions / bdf / "class") or "").startswith(_NVM_CLASS)
    ]


def _read_drive(root: Path, function: Path, mounts: tuple[Mount, ...]) -> NvmeDrive:
    controllers = [function / "nvme" / name for name in entries(function / "nvme")]
    namespaces = {
        f"nvme{match[1]}n{match[2]}"
        for controller in controllers
        for name in entries(controller)
        if (match := _NAMESPACE.fullmatch(name))
    }
    serial, model, firmware = (
        read_text(controllers[0] / name) if controllers else None
        for name in ("serial", "model", "firmware_rev")
    )
    return NvmeDrive(
        bdf=function.name,
        serial=serial,
        model=model,
        firmware=firmware,
        driver=link_name(function / "driver"),
        iommu_group=link_name(function / "iommu_group"),
        iommu_group_members=entries(function / "iommu_group/devices"),
        # It is -1 without NUMA, which read_count turns into None.
        numa_node=read_count(function / "numa_node"),
        namespaces=tuple(_read_namespace(root, name, mounts) for name in sorted(namespaces)),
    )


def _read_namespace(root: Path, name: str, mounts: tuple[Mount, ...]) -> Namespace:
    block = root / "sys/class/block"
    disk = block / name
    generic = name.replace("nvme", "ng")
    sectors = read_count(disk / "size")
    partitions = tuple(part for part in entries(disk) if exists(disk / part / "partition"))
    stack = (name, *partitions)
    holders = tuple(dict.fromkeys(h for device in stack for h in _holders(block, device)))
    return Namespace(
        name=name,
        block_node=f"/dev/{name}" if exists(disk) else None,
        generic_node=f"/dev/{generic}"
        if exists(root / "sys/class/nvme-generic" / generic)
        else None,
        nbytes=None if sectors is None else sectors * _SECTOR_NBYTES,
        block_nbytes=read_count(disk / "queue/logical_block_size"),
        partitions=partitions,
        holders=holders,
        mount_points=_mount_points(block, (*stack, *holders), mounts),
    )


def _holders(block: Path, device: str) -> Iterator[str]:
    for holder in entries(block / device / "holders"):
        yield holder
        yield from _holders(block, holder)


def _mount_points(
    block: Path, devices: tuple[str, ...], mounts: tuple[Mount, ...]
) -> tuple[str, ...]:
    numbers = {read_text(block / device / "dev") for device in devices}
    # btrfs shows a device number of its own, so source names are compared as well.
    sources = {f"/dev/{device}" for device in devices}
    sources |= {
        f"/dev/mapper/{name}"
        for device in devices
        if (name := read_text(block / device / "dm/name"))
    }
    return tuple(
        sorted({m.mount_point for m in mounts if m.device in numbers or m.source in sources})
    )
