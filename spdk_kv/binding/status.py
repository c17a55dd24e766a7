"""The command ``status``: every NVMe function, what uses it, and whether it may be taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spdk_kv.binding.hugepages import memlock_lines
from spdk_kv.binding.journal import BOUND, Journal, Record, read_boot_id
from spdk_kv.binding.report import DONE, Report
from spdk_kv.devices import NvmeDrive, list_drives
from spdk_kv.devices.inspection import (
    USE_CODES,
    Code,
    Kernel,
    Reason,
    Refused,
    Sightings,
    read_driver,
    read_facts,
    reasons_against,
    without_contents,
)
from spdk_kv.units import format_nbytes

_COLUMNS = ("BDF", "SERIAL", "MODEL", "SIZE", "DRIVER", "GROUP", "NUMA", "STATE")


def status(root: Path, kernel: Kernel) -> Report:
    """Reports every drive. Reads only, and never opens a drive that something uses."""
    trouble: list[Reason] = []
    records: dict[str, Record] = {}
    if kernel.is_root():  # only root may read the journal
        try:
            records = {record.bdf: record for record in Journal(root).records()}
        except Refused as error:
            trouble = list(error.reasons)
    # Reading what all processes use takes seconds, so it is done once for all drives.
    seen = Sightings(root, kernel)
    drives = [
        _drive(root, kernel, drive, records.get(drive.bdf), seen) for drive in list_drives(root)
    ]
    fields = {"reasons": [reason.fields() for reason in trouble], "drives": drives}
    return Report(DONE, _lines(drives, trouble), fields)


def _drive(
    root: Path, kernel: Kernel, drive: NvmeDrive, record: Record | None, seen: Sightings
) -> dict[str, Any]:
    facts = read_facts(root, kernel, drive.bdf, seen=seen)
    reasons = reasons_against(facts)
    state = "in-use" if without_contents(reasons) else "has-data" if reasons else "free"
    serial, model = drive.serial, drive.model
    if record is not None and (record.boot_id, record.inode) == (read_boot_id(root), facts.inode):
        bound = record.state == BOUND and read_driver(root, drive.bdf) == "vfio-pci"
        state = "bound" if bound else "unfinished"
        serial, model = record.serial, record.model
        reasons = () if bound else (*reasons, _unfinished(drive.bdf))
    return {
        "bdf": drive.bdf,
        "serial": serial,
        "model": model,
        "nbytes": drive.nbytes,
        "driver": drive.driver,
        "iommu_group": drive.iommu_group,
        "iommu_group_members": list(drive.iommu_group_members),
        "numa_node": drive.numa_node,
        "namespaces": [disk.name for disk in facts.disks],
        "state": _refined(state, reasons),
        "may_be_taken": state == "free",
        "reasons": [reason.fields() for reason in reasons],
        "note": facts.contents.note if facts.contents else "",
    }


def _unfinished(bdf: str) -> Reason:
    return Reason(Code.UNFINISHED, f"a bind or restore was interrupted: restore {bdf}")


def _refined(state: str, reasons: Sequence[Reason]) -> str:
    """``refused`` instead of ``in-use`` where nothing uses it, but there are other reasons."""
    if state == "in-use" and not any(reason.code in USE_CODES for reason in reasons):
        return "refused"
    return state


def _lines(drives: list[dict[str, Any]], trouble: list[Reason]) -> list[str]:
    lines = [f"{reason.code.value}: {reason.found}" for reason in trouble]
    if not drives:
        return [*lines, "no NVMe drive on PCI"]
    rows = [_COLUMNS, *(_row(drive) for drive in drives)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row, drive in zip(rows, [None, *drives], strict=True):
        lines.append("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        if drive is None:
            continue
        lines += [f"    {reason['code']}: {reason['found']}" for reason in drive["reasons"]]
        others = [m for m in drive["iommu_group_members"] if m != drive["bdf"]]
        if others:
            lines.append(f"    IOMMU group shared with {', '.join(others)}")
        if drive["note"]:
            lines.append(f"    {drive['note']}")
    return [*lines, *memlock_lines(None)]


def _row(drive: dict[str, Any]) -> tuple[str, ...]:
    size = "?" if drive["nbytes"] is None else format_nbytes(drive["nbytes"])
    names = ("driver", "iommu_group", "numa_node")
    driver, group, node = ("-" if drive[name] is None else str(drive[name]) for name in names)
    serial, model = (drive[name] or "?" for name in ("serial", "model"))
    return (drive["bdf"], serial, model, size, driver, group, node, drive["state"])
