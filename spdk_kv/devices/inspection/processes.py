"""What processes have mounted and open on a drive; this process's descriptors do not count."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.reasons import Code, Reason
from spdk_kv.devices.inspection.sightings import Sightings
from spdk_kv.devices.inspection.stack import Stack
from spdk_kv.devices.inspection.strict import listing, optional_link

# include/linux/proc_ns.h: the first namespaces of a boot have fixed inodes.
_FIRST_NAMESPACES = {"pid": "pid:[4026531836]", "user": "user:[4026531837]"}
_SYSTEM_MOUNTS = re.compile(r"/|/(boot|efi|usr)(/.*)?")


def check_host(root: Path) -> Iterator[Reason]:
    """Whether this process sees the whole machine; in a container it would miss mounts and users.

    Raises Unreadable.
    """
    own = root / "proc/self/ns"
    for name, first in _FIRST_NAMESPACES.items():
        if (found := optional_link(own / name)) != first:
            yield Reason(Code.NOT_HOST, f"this process runs in {name} namespace {found}: use a "
                         "shell of the host")  # fmt: skip
    mine, host = optional_link(own / "mnt"), optional_link(root / "proc/1/ns/mnt")
    if mine is None or mine != host:
        yield Reason(Code.NOT_HOST, f"this process has mount namespace {mine}, process 1 {host}: "
                     "use a shell of the host")  # fmt: skip


def check_mounts(root: Path, stack: Stack, seen: Sightings) -> Iterator[Reason]:
    """Mounts of anything on the drive, in any process's mount table. Raises Unreadable."""
    members = _filesystem_members(root, stack)
    for mount, pid in seen.mounts().items():
        device = stack.numbers.get(f"b{mount.device}")
        # btrfs shows a number of its own; bcachefs lists its devices separated by colons.
        for source in mount.source.split(":"):
            device = device or seen.place(source).member(stack)
        if device is None and mount.fstype == "btrfs":
            # The mount names one of several devices, which may be on another drive.
            device = members.get(mount.source.rpartition("/")[2])
        if device is None:
            continue
        where = f"{device} on {mount.mount_point} ({mount.fstype}), seen by process {pid}"
        yield Reason(Code.MOUNTED, where)
        if _SYSTEM_MOUNTS.fullmatch(mount.mount_point):
            yield Reason(Code.SYSTEM, f"{device} carries {mount.mount_point}")


def _filesystem_members(root: Path, stack: Stack) -> dict[str, str]:
    """Maps every device of each btrfs that uses the drive to the drive's device in it."""
    found: dict[str, str] = {}
    for uuid in listing(root / "sys/fs/btrfs"):
        devices = listing(root / "sys/fs/btrfs" / uuid / "devices")
        if ours := [name for name in devices if name in stack.names]:
            found |= dict.fromkeys(devices, ours[0])
    return found


def check_btrfs(root: Path, stack: Stack) -> Iterator[Reason]:
    """Every btrfs that is assembled on the drive, whether its mount is visible or not."""
    for device, ours in _filesystem_members(root, stack).items():
        if device == ours:
            yield Reason(Code.HOLDER, f"{ours} belongs to a btrfs that is in use")


def check_open(stack: Stack, seen: Sightings) -> Iterator[Reason]:
    """Descriptors, mappings and io_uring files on the drive's nodes. Raises Unreadable."""
    for process in seen.processes():
        for device in sorted(process.opened.on(stack)):
            yield Reason(Code.OPEN, f"{device} by process {process.pid} ({process.name})")


def check_nodes_open(root: Path, kernel: Kernel, nodes: Iterable[str]) -> Iterator[Reason]:
    """What has the character devices ``nodes`` (paths) open now.

    Raises Unreadable, OSError.
    """
    paths = {node: node for node in nodes}
    numbers = {
        number: node
        for node in paths
        if (place := root / node.lstrip("/")).exists()
        and (number := kernel.device_number(place)) is not None
    }
    yield from check_open(Stack((), (), (), (), numbers, paths), Sightings(root, kernel))
