"""May this drive be taken? A pure function from facts to reasons against it."""

from __future__ import annotations

from collections.abc import Iterator

from spdk_kv.devices.inspection.facts import NVM_EXPRESS_CLASS, Facts
from spdk_kv.devices.inspection.reasons import CONTENT_CODES, Code, Reason


def reasons_against(facts: Facts, serial: str | None = None) -> tuple[Reason, ...]:
    """Every reason against taking the drive; none means that it may be taken.

    Args:
        facts: what was found.
        serial: serial of the drive that the user means; None for display only.
    """
    if not facts.present:
        return (Reason(Code.NOT_FOUND, f"there is no PCI function {facts.bdf}"),)
    found = facts.contents.findings if facts.contents else []
    reasons = (*_identity(facts, serial), *facts.reasons, *found, *_isolation(facts))
    if not reasons and facts.contents is None:
        return (Reason(Code.UNREADABLE, "its contents were not read"),)
    return reasons


def without_contents(reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
    """``reasons`` without those that a user may consent to."""
    return tuple(reason for reason in reasons if reason.code not in CONTENT_CODES)


def _identity(facts: Facts, serial: str | None) -> Iterator[Reason]:
    if facts.pci_class != NVM_EXPRESS_CLASS:
        yield Reason(Code.NOT_NVME, f"its class is {facts.pci_class}, not {NVM_EXPRESS_CLASS}")
        return
    if facts.driver not in ("nvme", None):
        yield Reason(Code.DRIVER_OTHER, f"it has the driver {facts.driver}")
        return
    if facts.serial is None:
        hint = "" if facts.driver else f": echo {facts.bdf} > /sys/bus/pci/drivers/nvme/bind"
        found = f"its serial and contents are only known with the driver nvme, which it lacks{hint}"
        yield Reason(Code.SERIAL_UNKNOWN, found)
        return
    if serial is not None and serial != facts.serial:
        yield Reason(Code.SERIAL_MISMATCH, f"its serial is {facts.serial!r}, not {serial!r}")
    if len(facts.controllers) != 1:
        yield Reason(Code.NOT_INSPECTABLE, f"it has {len(facts.controllers)} controllers")
    if facts.state != "live":
        yield Reason(Code.CONTROLLER_NOT_LIVE, f"the controller is {facts.state}")
    if not facts.disks:
        yield Reason(Code.NOT_INSPECTABLE, "it has no namespace")
    for disk in facts.disks:
        if disk.number is None:
            yield Reason(Code.NOT_INSPECTABLE, f"{disk.name} has no block device to read")
        elif disk.nbytes == 0:
            yield Reason(Code.NOT_INSPECTABLE, f"{disk.name} has a format that Linux cannot read")
    if facts.other_paths:
        others = ", ".join(facts.other_paths)
        yield Reason(Code.MULTIPATH, f"its subsystem is also reached through {others}")
    if facts.virtual_functions:
        yield Reason(Code.SRIOV, f"it has {facts.virtual_functions} virtual functions")


def _isolation(facts: Facts) -> Iterator[Reason]:
    if facts.group is None or facts.group_kind == "vfio-noiommu":
        found = "no IOMMU protects memory from it: switch it on in the firmware and on the "
        found += "kernel's command line (intel_iommu=on or amd_iommu=on)"
        yield Reason(Code.NO_IOMMU, found)
    elif facts.members != (facts.bdf,):
        others = ", ".join(member for member in facts.members if member != facts.bdf)
        found = f"its IOMMU group {facts.group} also holds {others or 'nothing, not even itself'}"
        yield Reason(Code.IOMMU_SHARED, found)
    if facts.vfio == "missing":
        yield Reason(Code.VFIO_MISSING, "this kernel has no driver vfio-pci")


def changes(before: Facts, now: Facts) -> Iterator[Reason]:
    """What is different from the first look."""
    for name in ("inode", "serial", "driver", "override", "group", "controllers", "disks"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            yield Reason(Code.CHANGED, f"{name} was {old!r} and is now {new!r}")
    if before.writes != now.writes:
        yield Reason(Code.ACTIVE_IO, "it was written to between two looks")
    if before.contents and now.contents and before.contents.findings != now.contents.findings:
        yield Reason(Code.CHANGED, "its contents differ from those at the first look")
