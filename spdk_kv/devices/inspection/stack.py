"""A drive's stack of kernel objects: controllers, namespaces, partitions, and what is on them."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.strict import (
    Unreadable,
    listing,
    optional_link,
    optional_text,
    required_count,
)

# nvme0n1 is a disk, ng0n1 its character twin; nvme0c1n1 is a hidden path to the disk nvme0n1.
_NAMESPACE = re.compile(r"(?:nvme|ng)(\d+)(?:c\d+)?n(\d+)")
_CONTROLLER = re.compile(r"nvme\d+")
_SECTOR_NBYTES = 512  # the unit of sysfs' `size`, whatever the block size
_MAX_LINKS = 40  # the kernel's own limit, MAXSYMLINKS


@dataclass(frozen=True)
class Disk:
    """One namespace. ``number``: its node as b259:1, None where the kernel made no block node."""

    name: str
    number: str | None
    nbytes: int
    partitions: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its own node under /dev and those of its partitions."""
        return tuple(f"/dev/{name}" for name in (self.name, *self.partitions))


@dataclass(frozen=True)
class Stack:
    """The kernel objects of a drive.

    Attributes:
        characters: its character devices: controllers and generic nodes.
        holders: every dm, md or other block device on its disks, at any depth, with partitions.
        numbers: device number -> kernel name of all of these. It is written as b259:1 or c240:0,
            because block and character devices are numbered independently.
        aliases: /dev/mapper/NAME -> kernel name.
    """

    controllers: tuple[str, ...]
    disks: tuple[Disk, ...]
    characters: tuple[str, ...]
    holders: tuple[str, ...]
    numbers: dict[str, str]
    aliases: dict[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The kernel names of all of these."""
        disks = {name for disk in self.disks for name in (disk.name, *disk.partitions)}
        return frozenset(disks | set(self.characters) | set(self.holders))


def read_stack(root: Path, bdf: str) -> Stack:
    """The stack of NVMe function ``bdf`` as it is now. Raises Unreadable."""
    function = root / "sys/bus/pci/devices" / bdf
    block = root / "sys/class/block"
    controllers = tuple(n for n in listing(function / "nvme") if _CONTROLLER.fullmatch(n))
    found = {
        match.groups()
        for controller in controllers
        for name in listing(function / "nvme" / controller)
        if (match := _NAMESPACE.fullmatch(name))
    }
    # In the other direction as well: block devices that say they belong to this function.
    for name in listing(block):
        match = _NAMESPACE.fullmatch(name)
        if match and f"/{bdf}/" in os.path.realpath(block / name):
            found.add(match.groups())
    disks = tuple(
        _read_disk(block, f"nvme{instance}n{number}")
        for instance, number in sorted(found, key=lambda pair: (int(pair[0]), int(pair[1])))
    )
    return _stack_of(root, controllers, disks)


def read_namespace(root: Path, name: str) -> Stack:
    """The stack of the one namespace ``name`` (nvme0n1) as it is now. Raises Unreadable."""
    return _stack_of(root, (), (_read_disk(root / "sys/class/block", name),))


def _stack_of(root: Path, controllers: tuple[str, ...], disks: tuple[Disk, ...]) -> Stack:
    block = root / "sys/class/block"
    generics = tuple(disk.name.replace("nvme", "ng") for disk in disks)
    holders = _holders(block, [n for disk in disks for n in (disk.name, *disk.partitions)])
    numbers = {}
    for kind, base, names in (
        ("b", "block", [n for disk in disks for n in (disk.name, *disk.partitions)]),
        ("b", "block", holders),
        ("c", "nvme", controllers),
        ("c", "nvme-generic", generics),
    ):
        for name in names:
            number = optional_text(root / "sys/class" / base / name / "dev")
            if number is not None:
                numbers[kind + number.strip()] = name
    aliases = {}
    for name in holders:
        mapped = optional_text(block / name / "dm/name")
        if mapped is not None:
            aliases[f"/dev/mapper/{mapped.strip()}"] = name
    return Stack(controllers, disks, (*controllers, *generics), tuple(holders), numbers, aliases)


def _read_disk(block: Path, name: str) -> Disk:
    number = optional_text(block / name / "dev")
    if number is None:
        return Disk(name, None, 0, ())
    nbytes = required_count(block / name / "size") * _SECTOR_NBYTES
    return Disk(name, f"b{number.strip()}", nbytes, tuple(_partitions(block, name)))


def _partitions(block: Path, name: str) -> Iterator[str]:
    for entry in listing(block / name):
        if optional_text(block / name / entry / "partition") is not None:
            yield entry


def _holders(block: Path, bases: list[str]) -> list[str]:
    # A block device lists those above it in holders/, and those below it in slaves/. Both are read,
    # in case one of them is incomplete.
    above: dict[str, list[str]] = {}
    for name in listing(block):
        for slave in listing(block / name / "slaves"):
            above.setdefault(slave, []).append(name)
    found: list[str] = []
    waiting = list(bases)
    while waiting:
        name = waiting.pop()
        upper = [*listing(block / name / "holders"), *above.get(name, [])]
        if name not in bases:
            upper += _partitions(block, name)  # md0p1 is on md0
        for holder in upper:
            if holder not in found and holder not in bases:
                found.append(holder)
                waiting.append(holder)
    return sorted(found)


def final_path(root: Path, path: str) -> str:
    """``path`` with all links followed within ``root``; missing parts stay as written."""
    done, rest = "/", posixpath.normpath(path).strip("/").split("/")
    links = 0
    while rest:
        step = posixpath.normpath(posixpath.join(done, rest.pop(0)))
        target = _link_target(root, step)
        if target is None:
            done = step
            continue
        links += 1
        if links > _MAX_LINKS:
            raise Unreadable(f"{path}: too many links")
        whole = posixpath.normpath(posixpath.join(done, target))
        done, rest = "/", [*whole.strip("/").split("/"), *rest]
    return done


def _link_target(root: Path, path: str) -> str | None:
    place = root / path.lstrip("/")
    return optional_link(place) if place.is_symlink() else None


@dataclass(frozen=True)
class Place:
    """Where a path led.

    Attributes:
        final: the path with all links followed.
        number: number of the device node there, as b259:1; None if there is none.
        trouble: why that could not be read, if so; then only names can be compared.
    """

    path: str
    final: str
    number: str | None
    trouble: str | None = None

    def member(self, stack: Stack) -> str | None:
        """The name of the device of ``stack`` that it is; None if none of them.

        Compares names, because a node may be missing at the moment, and device numbers, because a
        node may have another name. Raises Unreadable.
        """
        for known in (self.path, self.final):
            if known in stack.aliases:
                return stack.aliases[known]
            folder, _, name = known.rpartition("/")
            if folder == "/dev" and name in stack.names:
                return name
        if self.trouble is not None:
            raise Unreadable(self.trouble)
        return None if self.number is None else stack.numbers.get(self.number)


def look_up(root: Path, kernel: Kernel, path: str) -> Place:
    """Where the node or link ``path`` leads; nowhere if not absolute. Raises Unreadable."""
    if not path.startswith("/"):
        return Place(path, path, None)
    final = final_path(root, path)
    try:
        return Place(path, final, kernel.device_number(root / final.lstrip("/")))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Place(path, final, None)
    except OSError as error:
        return Place(path, final, None, f"{final}: {error.strerror}")


def member_at(root: Path, kernel: Kernel, stack: Stack, path: str) -> str | None:
    """The device of ``stack`` that node or link ``path`` leads to now; None if none of them.

    Raises Unreadable.
    """
    return look_up(root, kernel, path).member(stack)
