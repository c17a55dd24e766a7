"""Exclusive claims on a drive's disks, held from the last look until the kernel releases the drive.

While they are held, nobody can mount, swap on, or build dm, md, LVM or ZFS on the drive or its
partitions: all of these need a claim as well (bd_prepare_to_claim in block/bdev.c), and a claim on
a whole disk excludes claims on its partitions. This closes the gap between "nothing uses it" and
the unbind. A claim is a read-only open, and changes nothing on the drive.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.reasons import Code, Reason
from spdk_kv.devices.inspection.stack import Disk


@dataclass
class Claims:
    """Claims that are held; ``refusals`` is empty if every disk could be claimed."""

    refusals: list[Reason] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def release(self) -> None:
        """Releases the claims, and with them the names that the kernel gives to the disks."""
        while self.fds:
            os.close(self.fds.pop())


@contextmanager
def claim(root: Path, kernel: Kernel, disks: Sequence[Disk]) -> Iterator[Claims]:
    """Holds exclusive claims on ``disks`` until the end of the block."""
    claims = Claims()
    try:
        for disk in disks:
            if disk.number is not None:
                _claim_one(root, kernel, disk, claims)
        yield claims
    finally:
        claims.release()


def _claim_one(root: Path, kernel: Kernel, disk: Disk, claims: Claims) -> None:
    try:
        claims.fds.append(kernel.open_exclusive(root / "dev" / disk.name))
        number = kernel.opened_number(claims.fds[-1])
    except OSError as error:
        busy = error.errno == errno.EBUSY
        code = Code.OPEN_EXCLUSIVE if busy else Code.UNREADABLE
        found = f"/dev/{disk.name}: {error.strerror}"
        found += ": it or a partition is claimed exclusively" if busy else ""
        claims.refusals.append(Reason(code, found))
        return
    if number != disk.number:
        # The node leads to another disk, which need not be a change since an earlier look.
        found = f"/dev/{disk.name} is {number}, but the drive's disk is {disk.number}"
        claims.refusals.append(Reason(Code.CHANGED, found))
