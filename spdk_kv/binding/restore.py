"""The commands ``restore``, which gives drives back, and ``rebind``, which a boot runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spdk_kv.binding.bind import (
    BindRequest,
    bind,
    check_bdf,
    is_same_drive,
)
from spdk_kv.binding.journal import Journal, Record
from spdk_kv.binding.kernel import WritableKernel
from spdk_kv.binding.permissions import permissions, withdraw
from spdk_kv.binding.persist import Entry, Persistence
from spdk_kv.binding.report import DONE, FAILED, REFUSED, Report, reported
from spdk_kv.binding.vfio import (
    VFIO_DRIVER,
    check_serial,
    give_back_steps,
    signals_deferred,
    take_again_steps,
)
from spdk_kv.devices.inspection import (
    Code,
    Refused,
    Unreadable,
    check_nodes_open,
    listing,
    read_driver,
    read_serial,
    refuse,
)


def restore(
    root: Path, kernel: WritableKernel, bdf: str | None, persistence: Persistence
) -> Report:
    """Gives back the drive at ``bdf``, or every drive that this tool has bound. Raises Refused."""
    if bdf is not None:
        check_bdf(bdf)
    if not kernel.is_root():
        raise refuse(Code.NOT_ROOT, "only root may change a drive's driver")
    journal = Journal(root)
    with journal.locked():
        records = journal.records()
        if bdf is None:
            reports = [_restore_one(root, kernel, journal, r, persistence) for r in records]
            if not reports:
                return Report(DONE, ["nothing to restore: this tool has bound no drive"])
            return _combined(reports)
        record = next((record for record in records if record.bdf == bdf), None)
        if record is None:
            raise refuse(Code.NOT_OURS, f"this tool has not bound {bdf}")
        return _restore_one(root, kernel, journal, record, persistence)


def rebind(root: Path, kernel: WritableKernel, persistence: Persistence) -> Report:
    """Binds every drive that --persist has recorded, after all checks. Raises Refused."""
    reports = []
    for entry in persistence.entries():
        reports.append(reported(_rebind_command(root, kernel, entry, persistence)))
    return _combined(reports) if reports else Report(DONE, ["no binding is persistent"])


def _rebind_command(
    root: Path, kernel: WritableKernel, entry: Entry, persistence: Persistence
) -> Callable[[], Report]:
    def command() -> Report:
        found = [
            bdf
            for bdf in listing(root / "sys/bus/pci/devices")
            if read_serial(root, bdf) == entry.serial
        ]
        if len(found) != 1:
            found_at = ", ".join(found) or "there is none"
            message = f"serial {entry.serial} is not that of exactly one drive: {found_at}"
            raise refuse(Code.NOT_FOUND, message)
        request = BindRequest(found[0], entry.serial, yes=True, kinds=frozenset(entry.kinds))
        report = bind(root, kernel, request, persistence)
        if report.status != DONE or entry.group is None:
            return report
        granted = reported(
            lambda: permissions(root, kernel, found[0], str(entry.group), persistence)
        )
        if granted.status == DONE:
            return report
        # The drive is bound, so this is not a refusal.
        lines = [*report.lines, "but its permissions could not be set:", *granted.lines]
        return Report(FAILED, lines, {**report.fields, **granted.fields})

    return command


def _combined(reports: list[Report]) -> Report:
    # max: a failure outranks a refusal.
    return Report(
        max(report.status for report in reports),
        [line for report in reports for line in report.lines],
        {
            "reasons": [r for report in reports for r in report.fields.get("reasons", [])],
            "drives": [{"status": report.status, **report.fields} for report in reports],
        },
    )


def _restore_one(
    root: Path, kernel: WritableKernel, journal: Journal, record: Record, persistence: Persistence
) -> Report:
    report = reported(lambda: _give_back(root, kernel, journal, record))
    fields = {"bdf": record.bdf, "serial": record.serial, **report.fields}
    lines = list(report.lines)
    if report.status == DONE:
        try:
            withdraw(root, kernel, record.bdf)
            if persistence.remove(record.serial):
                lines.append("it will not be bound again at the next boot")
        except (Refused, OSError) as error:
            # The drive was given back, so this is not a refusal.
            return Report(FAILED, [*lines, f"but: {error}"], fields | {"failure": str(error)})
    elif report.status == REFUSED:
        lines[0] = f"{record.bdf}: {lines[0]}"
    return Report(report.status, lines, fields)


def _give_back(root: Path, kernel: WritableKernel, journal: Journal, record: Record) -> Report:
    if not is_same_drive(root, record):
        # A reboot or unplugging has given it back; what is there now is not this tool's.
        journal.remove(record.bdf)
        line = f"{record.bdf} ({record.serial}) was given back by a reboot or by being unplugged"
        return Report(DONE, [line], {"state": "gone"})
    _check_unused(root, kernel, record)
    driver = read_driver(root, record.bdf)
    with signals_deferred():
        try:
            for _ in give_back_steps(root, kernel, journal, record):
                pass
        except Refused:
            raise  # comes only before the first step, if someone else has changed it
        except Exception as error:  # whatever failed, the drive must not be left without a driver
            return _take_again(root, kernel, journal, record, driver, str(error))
    try:
        trouble = check_serial(root, record)
    except (Unreadable, OSError) as error:
        trouble = str(error)
    if trouble is not None:
        lines = [f"{record.bdf} is back with {record.former_driver}, but {trouble}"]
        return Report(FAILED, lines, {"state": "free", "failure": trouble, "rolled_back": False})
    line = f"{record.bdf} ({record.serial}) is back with the driver {record.former_driver}"
    return Report(DONE, [line], {"state": "free"})


def _check_unused(root: Path, kernel: WritableKernel, record: Record) -> None:
    """Raises Refused while a process uses it: the kernel would wait for that process to end."""
    nodes = {f"/dev/vfio/{record.group}"}
    # The newer interface, iommufd, has a node per function.
    for name in listing(root / "sys/bus/pci/devices" / record.bdf / "vfio-dev"):
        nodes.add(f"/dev/vfio/devices/{name}")
    found = [reason.found for reason in check_nodes_open(root, kernel, nodes)]
    if found:
        raise refuse(Code.IN_USE, f"{record.bdf} is in use; end this first: {', '.join(found)}")


def _take_again(
    root: Path,
    kernel: WritableKernel,
    journal: Journal,
    record: Record,
    driver: str | None,
    failure: str,
) -> Report:
    lines = [f"failed: {failure}"]
    trouble: str | None = "it had no driver before"
    if read_driver(root, record.bdf) == record.former_driver:
        trouble = f"the driver {record.former_driver} already has it"
    elif driver == VFIO_DRIVER:
        try:
            for _ in take_again_steps(root, kernel, journal, record):
                pass
            trouble = None
        except Exception as error:
            trouble = str(error)
    if trouble is None:
        lines.append(f"rolled back: {VFIO_DRIVER} still has {record.bdf}")
    else:
        lines.append(f"not rolled back: {trouble}; try: restore {record.bdf}")
    fields = {"state": "unfinished" if trouble else "bound", "failure": failure}
    return Report(FAILED, lines, fields | {"rolled_back": trouble is None})
