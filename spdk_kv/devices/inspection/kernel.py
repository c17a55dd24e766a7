"""What reading files cannot answer: device numbers, exclusive claims, what a command prints.

One small class, so that tests can put a kernel of their own behind a tree of files. Its subclass
in `binding/` writes.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A fixed search path, because these run as root, and PATH may contain anything.
_TOOL_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_TOOL_TIMEOUT_S = 60.0
_LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
_LOOP_INFO64_NBYTES = 232


class ToolMissing(Exception):
    """A command that is needed is not installed; the message is its name."""


@dataclass(frozen=True)
class Completed:
    """How a command ended, and what it printed."""

    status: int
    output: str
    error: str


class Kernel:
    """This machine's kernel and commands."""

    def run(self, command: Sequence[str]) -> Completed:
        """Runs ``command`` to its end, for at most a minute. Raises ToolMissing, OSError.

        This room runs only ``wipefs --no-act`` and ``blkid``, which read.
        """
        tool = shutil.which(command[0], path=_TOOL_PATH)
        if tool is None:
            raise ToolMissing(command[0])
        try:
            done = subprocess.run(
                [tool, *command[1:]],
                env={"PATH": _TOOL_PATH, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TOOL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(errno.ETIMEDOUT, f"no answer in {_TOOL_TIMEOUT_S:.0f} s", tool) from error
        # backslashreplace: a label may hold any bytes, and must remain comparable and printable.
        return Completed(
            done.returncode,
            done.stdout.decode(errors="backslashreplace"),
            done.stderr.decode(errors="backslashreplace"),
        )

    def has_tool(self, name: str) -> bool:
        """Whether :meth:`run` would find ``name``."""
        return shutil.which(name, path=_TOOL_PATH) is not None

    def open_exclusive(self, path: Path) -> int:
        """A read-only descriptor that keeps mount, swapon, dm and md from claiming ``path``.

        On a whole disk the claim covers its partitions. Raises OSError, with EBUSY if the disk or a
        partition is already claimed.
        """
        return os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW)

    def device_number(self, path: Path) -> str | None:
        """The number of the device node at ``path``, as b259:1 (block) or c240:0; None for a file.

        Follows links, those of /proc/PID/fd included. Raises OSError.
        """
        found = os.stat(path)
        kind = "b" if stat.S_ISBLK(found.st_mode) else "c" if stat.S_ISCHR(found.st_mode) else ""
        return f"{kind}{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if kind else None

    def opened_number(self, fd: int) -> str | None:
        """The number of the device node that ``fd`` has open, as b259:1; None for a file."""
        return self.device_number(Path(f"/proc/self/fd/{fd}"))

    def loop_backing_number(self, node: Path) -> str | None:
        """The number of the block device behind loop device ``node``; None if it is a file.

        sysfs shows only a path, which means nothing here if it is one within a container. Raises
        OSError.
        """
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = bytearray(_LOOP_INFO64_NBYTES)
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
        finally:
            os.close(fd)
        (rdevice,) = struct.unpack_from("Q", info, 16)  # after lo_device and lo_inode
        return f"b{os.major(rdevice)}:{os.minor(rdevice)}" if rdevice else None

    def group_id(self, name: str) -> int:
        """The number of the group ``name``. Raises KeyError."""
        return grp.getgrnam(name).gr_gid

    def is_root(self) -> bool:
        """Whether this process is root."""
        return os.geteuid() == 0
