"""Why a drive may not be taken: stable codes, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Code(str, Enum):
    """Scripts may rely on these: a code keeps its name and meaning in every version."""

    # Which drive.
    NOT_FOUND = "not-found"  # no such PCI function or drive
    NOT_NVME = "not-nvme"  # the function's class is not NVMe I/O controller
    SERIAL_MISMATCH = "serial-mismatch"  # another drive is at that address
    SERIAL_UNKNOWN = "serial-unknown"  # the kernel does not know the drive's serial
    DRIVER_OTHER = "driver-other"  # it has a driver other than nvme
    NOT_INSPECTABLE = "not-inspectable"  # no namespace, or no block device to read
    CONTROLLER_NOT_LIVE = "controller-not-live"  # resetting, failed or still starting
    MULTIPATH = "multipath"  # another controller reaches its subsystem
    SRIOV = "sriov"  # it has virtual functions enabled
    CHANGED = "changed"  # between two looks it became another drive or got other data

    # What uses it.
    MOUNTED = "mounted"
    SYSTEM = "system"  # root, boot, EFI or resume, now or at the next boot
    SWAP = "swap"
    HOLDER = "holder"  # dm (LVM, LUKS, multipath), md, bcache, btrfs
    LOOP = "loop"
    EXPORT = "export"  # nvmet, LIO, USB gadget
    OPEN = "open"
    OPEN_EXCLUSIVE = "open-exclusive"
    ACTIVE_IO = "active-io"
    CONFIGURED = "configured"  # fstab, crypttab, mdadm.conf or the like name it

    # What is on it; only the first two yield to --i-know-this-destroys.
    SIGNATURE = "signature"
    DATA = "data"
    NOT_SHOWN = "not-shown"  # the flag was given for a list that was never shown

    # What protects memory from it.
    NO_IOMMU = "no-iommu"
    IOMMU_SHARED = "iommu-shared"
    VFIO_MISSING = "vfio-missing"

    # Whether the answers can be trusted.
    NOT_ROOT = "not-root"
    NOT_HOST = "not-host"  # in a container, where the host's mounts and processes are invisible
    TOOL_MISSING = "tool-missing"
    UNREADABLE = "unreadable"

    # The state that this tool keeps.
    BUSY = "busy"  # another run is under way
    UNFINISHED = "unfinished"  # an earlier bind was interrupted: restore first
    JOURNAL = "journal"  # its journal cannot be read or trusted
    NOT_OURS = "not-ours"  # it did not bind this drive
    IN_USE = "in-use"  # a process uses it through VFIO
    NOT_POSSIBLE = "not-possible"  # a setting that this machine cannot have


CONTENT_CODES = (Code.SIGNATURE, Code.DATA)
# Codes that say what uses the drive; such a drive is neither read nor opened exclusively.
USE_CODES = (
    *(Code.MOUNTED, Code.SYSTEM, Code.SWAP, Code.HOLDER, Code.LOOP, Code.EXPORT),
    *(Code.OPEN, Code.OPEN_EXCLUSIVE, Code.ACTIVE_IO, Code.CONFIGURED),
)


@dataclass(frozen=True)
class Reason:
    """One reason; ``found`` says in words what was seen, and where."""

    code: Code
    found: str

    def fields(self) -> dict[str, str]:
        """The reason as in JSON."""
        return {"code": self.code.value, "found": self.found}


class Refused(Exception):
    """A refusal, with its reasons: nothing was changed, or everything was put back."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__("; ".join(f"{reason.code.value}: {reason.found}" for reason in reasons))
        self.reasons = tuple(reasons)


def refuse(code: Code, found: str) -> Refused:
    """A refusal with one reason, to be raised."""
    return Refused([Reason(code, found)])
