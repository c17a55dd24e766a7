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

    ``device``: "major:minor" as stat(2) shows it. ``root``: the part of the filesystem that is
    mounted. ``options``: those of the superblock, not of this mount.
    """

    device: str
    root: str
    mount_point: str
    fstype: str
    source: str
    options: tuple[str, ...]


def read_mounts(root: Path = Path("/")) -> tuple[Mount, ...]:
    """Every mount that this process sees; lines of another form are left out."""
    text = read_text(root / "proc/self/mountinfo") or ""
    return tuple(mount for line in text.splitlines() if (mount := _parse(line)) is not None)


def _parse(line: str) -> Mount | None:
    # A hyphen ends the optional fields, whose number varies: "36 35 8:1 / /mnt rw shared:1 - ext4
    # /dev/sda1 rw".
    left, hyphen, right = line.partition(" - ")
    head, tail = left.split(" "), right.split(" ")
    if not hyphen or len(head) < 6 or len(tail) < 3:
        return None
    return Mount(
        device=head[2],
        root=_unescape(head[3]),
        mount_point=_unescape(head[4]),
        fstype=tail[0],
        source=_unescape(tail[1]),
        options=tuple(tail[2].split(",")),
    )


def _unescape(field: str) -> str:
    # The kernel writes space, tab, newline, backslash and '#' as three octal digits.
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
