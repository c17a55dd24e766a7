"""The mount table of this process, from /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices.sysfs import read_text

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mounted filesystem.

    Attributes:
        device: device number, "major:minor", as stat(2) shows it.
        root: the folder of the filesystem that is mounted.
        options: of the superblock, not of this mount.
    """

    device: str
    root: str
    mount_point: str
    fstype: str
    source: str
    options: tuple[str, ...]


def read_mounts(root: Path = Path("/")) -> tuple[Mount, ...]:
    """Every mount that this process sees; lines of an unknown form are left out."""
    return parse_mounts(read_text(root / "proc/self/mountinfo") or "")


def parse_mounts(text: str) -> tuple[Mount, ...]:
    """The mounts in ``text``, a mountinfo file; lines of an unknown form are left out."""
    return tuple(mount for line in text.split("\n") if (mount := _parse(line)) is not None)


def _parse(line: str) -> Mount | None:
    # A hyphen ends the optional fields, whose number varies:
    # "36 35 8:1 / /mnt rw shared:1 - ext4 /dev/sda1 rw".
    left, hyphen, right = line.partition(" - ")
    head, tail = left.split(" "), right.split(" ")
    if not hyphen or len(head) < 6 or len(tail) < 3:
        return None
    return Mount(
        device=head[2],
        root=unescape(head[3]),
        mount_point=unescape(head[4]),
        fstype=tail[0],
        source=unescape(tail[1]),
        options=tuple(tail[2].split(",")),
    )


def unescape(field: str) -> str:
    """Undoes the octal escapes with which the kernel writes space, tab, newline, \\ and #."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
