"""The PC: its drives and the rest, as QEMU's command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labkit.needs import Host

MIB = 1 << 20


@dataclass
class Drive:
    """An NVMe drive on a sparse raw file.

    ``name``: QEMU's name for it, for :meth:`Machine.unplug`. ``image``: the file, made where it is
    missing. ``shares_group_with``: the name of an earlier drive whose card it is the second
    function of, so that both are one IOMMU group. ``bad_blocks``: 512-byte blocks of the image
    that fail to be read. ``metadata_nbytes``: beside each block. ``write_log``: a
    file in the machine's ``share`` that records every write. ``parts``: namespaces of these sizes,
    one behind the other in the image, instead of one; their sum is ``nbytes``.
    """

    name: str
    serial: str
    nbytes: int = 256 * MIB
    block_nbytes: int = 512
    image: Path | None = None
    shares_group_with: str | None = None
    bad_blocks: Sequence[int] = ()
    metadata_nbytes: int = 0
    write_log: str | None = None
    parts: Sequence[int] = ()


@dataclass
class Hardware:
    """The whole machine. ``memory_nbytes`` is the guest's, ``hugepage_nbytes`` a part of it."""

    drives: list[Drive] = field(default_factory=list)
    iommu: bool = True
    cpus: int = 2
    memory_nbytes: int = 3072 * MIB
    hugepage_nbytes: int = 512 * MIB


def default_drives() -> list[Drive]:
    """n0 with 512-byte blocks, n1 with 4096-byte ones."""
    return [Drive("n0", "LAB-N0"), Drive("n1", "LAB-N1", block_nbytes=4096)]


def _nodes(drive: Drive, folder: Path) -> list[dict[str, object]]:
    """The drive's image as nodes of QEMU's block layer: one for each namespace, and below."""
    image: dict[str, object] = {"driver": "file", "filename": str(drive.image)}
    if drive.bad_blocks:
        # The raw layer above raises the event for each of its reads (QEMU: docs/devel/blkdebug).
        errors = [
            {"event": "read_aio", "iotype": "read", "errno": 5, "sector": sector, "once": False}
            for sector in drive.bad_blocks
        ]
        image = {"driver": "blkdebug", "image": image, "inject-error": errors}
    if drive.write_log:
        log = folder / "share" / drive.write_log
        log.touch()
        image = {
            "driver": "blklogwrites",
            "file": image,
            "log": {"driver": "file", "filename": str(log)},
        }
    common = {"driver": "raw", "discard": "unmap"}
    if not drive.parts:
        return [{**common, "node-name": f"{drive.name}-image1", "file": image}]
    whole = f"{drive.name}-whole"
    nodes: list[dict[str, object]] = [{**image, "node-name": whole, "discard": "unmap"}]
    offset = 0
    for number, nbytes in enumerate(drive.parts, 1):
        part = {"node-name": f"{drive.name}-image{number}", "file": whole}
        nodes.append({**common, **part, "offset": offset, "size": nbytes})
        offset += nbytes
    return nodes


def _drive_options(drives: list[Drive], folder: Path) -> list[str]:
    options = []
    functions: dict[str, int] = {}
    cards: dict[str, str] = {}
    shared = {drive.shares_group_with for drive in drives}
    for number, drive in enumerate(drives):
        card = cards[drive.name] = cards.get(drive.shares_group_with or "", drive.name)
        function = functions[card] = functions.get(card, -1) + 1
        if function == 0:
            # A port for each card: what sits on the root bus cannot be unplugged.
            options += ["-device", f"pcie-root-port,id=port-{card},chassis={number + 1}"]
        place = f"bus=port-{card},addr=0.{function}"
        if function == 0 and drive.name in shared:
            place += ",multifunction=on"
        block = f"logical_block_size={drive.block_nbytes},physical_block_size={drive.block_nbytes}"
        block += f",ms={drive.metadata_nbytes}"
        for node in _nodes(drive, folder):
            options += ["-blockdev", json.dumps(node)]
        options += ["-device", f"nvme,id={drive.name},serial={drive.serial},{place}"]
        if drive.parts:
            block += ",share-rw=on"
        for nsid in range(1, 1 + max(1, len(drive.parts))):
            namespace = f"drive={drive.name}-image{nsid},nsid={nsid},{block}"
            options += ["-device", f"nvme-ns,bus={drive.name},{namespace}"]
    return options


def _share(tag: str, folder: str, readonly: bool) -> list[str]:
    # Several host file systems may be behind one folder: `remap` keeps their inodes apart.
    backend = f"local,id={tag},path={folder},security_model=none,multidevs=remap"
    if readonly:
        backend += ",readonly=on"
    return ["-fsdev", backend, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def accelerator_options(accelerator: str) -> list[str]:
    """QEMU's options for ``kvm`` or ``tcg``."""
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


def command_line(
    host: Host, hardware: Hardware, accelerator: str, folder: Path, arguments: str
) -> list[str]:
    """QEMU's command line but for the console; ``arguments`` go to the guest's kernel.

    ``folder`` holds the initramfs, the sockets, and ``share``, which the guest may write.
    """
    # On a busy host the emulated timer ticks too seldom for the kernel's check of it, which panics.
    kernel = f"console=ttyS0 loglevel=4 panic=-1 no_timer_check {arguments}"
    machine = "q35"
    iommu = []
    if hardware.iommu:
        machine += ",kernel-irqchip=split"
        kernel += " intel_iommu=on"
        # With the default of 39 bits DPDK stops: "IOVA exceeding limits of current DMA mask".
        iommu = ["-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48"]
    return [
        *(host.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", machine, *accelerator_options(accelerator)),
        *("-smp", str(hardware.cpus), "-m", str(hardware.memory_nbytes // MIB)),
        # Real slots signal through PCIe's own registers, not through ACPI.
        *("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),
        *iommu,
        *("-kernel", str(host.kernel), "-initrd", str(folder / "initramfs"), "-append", kernel),
        *_share("hostroot", "/", readonly=True),
        *_share("labshare", str(folder / "share"), readonly=False),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=link,path={folder / 'link'},server=on,wait=off"),
        *("-device", "virtserialport,chardev=link,name=spdk_kv.lab"),
        *("-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"),
        *_drive_options(hardware.drives, folder),
    ]
