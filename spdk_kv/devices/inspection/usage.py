"""What uses a drive through the kernel: swap, holders, loop devices, exports, I/O in flight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.processes import check_btrfs, check_mounts, check_open
from spdk_kv.devices.inspection.reasons import Code, Reason
from spdk_kv.devices.inspection.sightings import Sightings
from spdk_kv.devices.inspection.stack import Stack, member_at
from spdk_kv.devices.inspection.strict import (
    Unreadable,
    listing,
    optional_link_name,
    optional_text,
    required_text,
)
from spdk_kv.devices.mounts import unescape

# Modules that export block devices -> where configfs then shows what they export.
_EXPORTERS = {"nvmet": "nvmet", "target_core_mod": "target"}
# Attributes below sys/kernel/config that hold the path of an exported block device.
_EXPORTED = (
    "nvmet/subsystems/*/namespaces/*/device_path",
    "nvmet/subsystems/*/passthru/device_path",
    "target/core/*/*/udev_path",
    "usb_gadget/*/functions/mass_storage.*/lun.*/file",
)


def check_usage(root: Path, kernel: Kernel, stack: Stack, seen: Sightings) -> Iterator[Reason]:
    """Everything that uses the drive; processes are those in ``seen``.

    Raises Unreadable, OSError.
    """
    yield from check_kernel_use(root, kernel, stack, seen)
    yield from check_open(stack, seen)
    yield from _check_in_flight(root, stack)


def check_kernel_use(root: Path, kernel: Kernel, stack: Stack, seen: Sightings) -> Iterator[Reason]:
    """What the kernel itself does with the drive; mounts are those in ``seen``.

    Raises Unreadable, OSError.
    """
    yield from check_mounts(root, stack, seen)
    yield from check_btrfs(root, stack)
    yield from _check_swap(root, kernel, stack)
    yield from _check_holders(root, stack)
    yield from _check_loops(root, kernel, stack)
    yield from _check_exports(root, kernel, stack)


def _check_swap(root: Path, kernel: Kernel, stack: Stack) -> Iterator[Reason]:
    # The file is missing in a kernel without swap. Its first line is a heading.
    for line in (optional_text(root / "proc/swaps") or "").split("\n")[1:]:
        path = unescape(re.split(r"[ \t]", line)[0])
        if device := member_at(root, kernel, stack, path.removesuffix(" (deleted)")):
            yield Reason(Code.SWAP, f"{device} is used as swap")


def _check_holders(root: Path, stack: Stack) -> Iterator[Reason]:
    for holder in stack.holders:
        folder = root / "sys/class/block" / holder
        if listing(folder / "md"):
            kind = f"md array ({(optional_text(folder / 'md/level') or 'unknown level').strip()})"
        elif listing(folder / "dm"):
            uuid = (optional_text(folder / "dm/uuid") or "").strip()
            kind = f"device-mapper {uuid.partition('-')[0] or 'device'}"  # LVM-, CRYPT-, mpath-
            kind += f" {(optional_text(folder / 'dm/name') or '').strip()}"
        else:
            kind = "device"
        yield Reason(Code.HOLDER, f"{kind.strip()} ({holder}) uses it")


def _check_loops(root: Path, kernel: Kernel, stack: Stack) -> Iterator[Reason]:
    # A loop device opens its backing device inside the kernel, so no process shows it.
    block = root / "sys/class/block"
    for name in listing(block):
        backing = optional_text(block / name / "loop/backing_file")
        if backing is None:
            continue
        device = member_at(root, kernel, stack, backing.strip().removesuffix(" (deleted)"))
        try:
            number = kernel.loop_backing_number(root / "dev" / name)
        except OSError as error:
            raise Unreadable(f"/dev/{name}: {error.strerror}") from error
        device = device or stack.numbers.get(number or "")
        if device:
            yield Reason(Code.LOOP, f"{name} is backed by {device}")


def _check_exports(root: Path, kernel: Kernel, stack: Stack) -> Iterator[Reason]:
    config = root / "sys/kernel/config"
    for module, folder in _EXPORTERS.items():
        if (root / "sys/module" / module).exists() and not (config / folder).exists():
            raise Unreadable(
                f"{config / folder}: {module} is loaded, but what it exports is not visible: "
                "mount -t configfs none /sys/kernel/config"
            )
    for pattern in _EXPORTED:
        for attribute in sorted(config.glob(pattern)):
            path = (optional_text(attribute) or "").strip()
            if path and (device := member_at(root, kernel, stack, path)):
                shown = attribute.relative_to(config).parent
                yield Reason(Code.EXPORT, f"{device} is exported by {shown}")
    rnbd = root / "sys/class/rnbd-server/ctl/devices"
    for name in listing(rnbd):
        device = (optional_link_name(rnbd / name / "block_dev") or "").strip()
        if device in stack.names:
            yield Reason(Code.EXPORT, f"{device} is exported by rnbd-server as {name}")


def _check_in_flight(root: Path, stack: Stack) -> Iterator[Reason]:
    for disk in stack.disks:
        if disk.number is None:
            continue
        reads, writes = required_text(root / "sys/class/block" / disk.name / "inflight").split()
        if (reads, writes) != ("0", "0"):
            yield Reason(Code.ACTIVE_IO, f"{disk.name}: {reads} reads, {writes} writes in flight")


def writes_completed(root: Path, stack: Stack) -> dict[str, tuple[str, ...]]:
    """Per disk, the counters of writes and discards: equal before and after means untouched.

    Raises Unreadable.
    """
    counts = {}
    for disk in stack.disks:
        if disk.number is not None:
            # Documentation/block/stat.rst: fields 5 to 7 count writes, 12 to 14 discards.
            fields = required_text(root / "sys/class/block" / disk.name / "stat").split()
            counts[disk.name] = (*fields[4:7], *fields[11:14])
    return counts
