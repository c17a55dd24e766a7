"""Why a drive may not be taken: stable codes, each with what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Code(str, Enum):
    """What scripts may rely on: a code keeps its name and its meaning in every version."""

    # Which drive.
    NOT_FOUND = "not-found"  # no PCI function, or no drive, of that name
    NOT_NVME = "not-nvme"  # the function's class is not NVMe I/O controller
    SERIAL_MISMATCH = "serial-mismatch"  # the drive at that address is another one
    SERIAL_UNKNOWN = "serial-unknown"  # the kernel does not say who the drive is
    DRIVER_OTHER = "driver-other"  # a driver other than nvme has it
    NOT_INSPECTABLE = "not-inspectable"  # nothing to look into: no namespace, or no block node
    CONTROLLER_NOT_LIVE = "controller-not-live"  # resetting, failed or still starting
    MULTIPATH = "multipath"  # its subsystem is reached by another controller too
    SRIOV = "sriov"  # it has virtual functions switched on
    CHANGED = "changed"  # between two looks it became another drive, or other data

    # Who uses it.
    MOUNTED = "mounted"
    SYSTEM = "system"  # root, boot, EFI or resume, now or at the next boot
    SWAP = "swap"
    HOLDER = "holder"  # dm (LVM, LUKS, multipath), md, bcache, btrfs
    LOOP = "loop"
    EXPORT = "export"  # nvmet, LIO, USB gadget
    OPEN = "open"
    OPEN_EXCLUSIVE = "open-exclusive"
    ACTIVE_IO = "active-io"
    CONFIGURED = "configured"  # fstab, crypttab, mdadm.conf and the like name it

    # What is on it; only these two yield to --i-know-this-destroys.
    SIGNATURE = "signature"
    DATA = "data"
    NOT_SHOWN = "not-shown"  # the flag was given for a list that was never shown

    # What protects memory from it.
    NO_IOMMU = "no-iommu"
    IOMMU_SHARED = "iommu-shared"
    VFIO_MISSING = "vfio-missing"

    # Whether the answers can be trusted.
    NOT_ROOT = "not-root"
    NOT_HOST = "not-host"  # in a container: the host's mounts and processes are out of sight
    TOOL_MISSING = "tool-missing"
    UNREADABLE = "unreadable"

    # The state that this tool keeps.
    BUSY = "busy"  # another run of it is under way
    UNFINISHED = "unfinished"  # an earlier bind was interrupted: restore first
    JOURNAL = "journal"  # its journal cannot be read or trusted
    NOT_OURS = "not-ours"  # it did not bind this drive
    IN_USE = "in-use"  # a process drives it over VFIO
    NOT_POSSIBLE = "not-possible"  # a setting that this machine cannot give


CONTENT_CODES = (Code.SIGNATURE, Code.DATA)
# What only says who uses the drive; such a drive is not looked into, nor opened exclusively.
USE_CODES = (
    *(Code.MOUNTED, Code.SYSTEM, Code.SWAP, Code.HOLDER, Code.LOOP, Code.EXPORT),
    *(Code.OPEN, Code.OPEN_EXCLUSIVE, Code.ACTIVE_IO, Code.CONFIGURED),
)


@dataclass(frozen=True)
class Reason:
    """``found``: what was seen, and where, in words."""

    code: Code
    found: str

    def fields(self) -> dict[str, str]:
        """As JSON has it."""
        return {"code": self.code.value, "found": self.found}


class Refused(Exception):
    """Nothing was changed, or all of it was put back, and these are the reasons."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__("; ".join(f"{reason.code.value}: {reason.found}" for reason in reasons))
        self.reasons = tuple(reasons)


def refuse(code: Code, found: str) -> Refused:
    """A refusal with one reason, to be raised."""
    return Refused([Reason(code, found)])
