"""The command ``bind``: checks the drive, claims it, checks again, takes it; undoes a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from spdk_kv.binding.journal import BINDING, BOUND, Journal, Record, read_boot_id
from spdk_kv.binding.kernel import WritableKernel
from spdk_kv.binding.persist import Persistence
from spdk_kv.binding.report import DONE, FAILED, Report, refusal
from spdk_kv.binding.vfio import VFIO_DRIVER, bind_steps, give_back_steps, signals_deferred
from spdk_kv.devices.inspection import (
    BDF,
    CONTENT_CODES,
    Code,
    Facts,
    Reason,
    Refused,
    changes,
    claim,
    read_driver,
    read_facts,
    reasons_against,
    refuse,
    without_contents,
)


@dataclass(frozen=True)
class BindRequest:
    """What the user typed.

    Attributes:
        bdf: full PCI address.
        serial: serial of the drive that is meant.
        yes: do it; otherwise this is a dry run.
        destroys: the serial after --i-know-this-destroys.
        persist: bind again at every boot.
        kinds: at a boot, the kinds of contents that the user consented to; None otherwise.
    """

    bdf: str
    serial: str
    yes: bool = False
    destroys: str | None = None
    persist: bool = False
    kinds: frozenset[str] | None = None


def bind(
    root: Path, kernel: WritableKernel, request: BindRequest, persistence: Persistence
) -> Report:
    """Takes the drive, or without ``yes`` reports what it would do. Raises Refused."""
    check_bdf(request.bdf)
    if request.destroys not in (None, request.serial):
        found = f"--i-know-this-destroys names {request.destroys!r}, not {request.serial!r}"
        raise refuse(Code.SERIAL_MISMATCH, found)
    if not kernel.is_root():
        raise refuse(Code.NOT_ROOT, "only root can see what every process uses")
    if request.persist:
        persistence.check()
    journal = Journal(root)
    with journal.locked():
        if (report := _already_bound(root, journal, request)) is not None:
            return report
        before = read_facts(root, kernel, request.bdf)
        consent = _consents(root, journal, request, before)
        reasons = reasons_against(before, request.serial)
        if consent:
            reasons = without_contents(reasons)
        elif request.destroys is not None and reasons != without_contents(reasons):
            found = "this list is shown for the first time: read it, then repeat the command"
            reasons = (*reasons, Reason(Code.NOT_SHOWN, found))
        if reasons:
            return _refused(reasons, before)
        if not request.yes:
            return _plan(request, before)
        return _take(root, kernel, journal, request, before, consent, persistence)


def check_bdf(bdf: str) -> None:
    """Raises Refused unless ``bdf`` is one full PCI address."""
    if not BDF.fullmatch(bdf):
        found = f"{bdf!r} is not a full PCI address in lower case, like 0000:01:00.0"
        raise refuse(Code.NOT_FOUND, found)


def is_same_drive(root: Path, record: Record) -> bool:
    """Whether ``record`` still applies: it is of this boot, and the drive was never unplugged."""
    try:
        inode = (root / "sys/bus/pci/devices" / record.bdf).stat().st_ino
    except FileNotFoundError:
        return False
    return (record.boot_id, record.inode) == (read_boot_id(root), inode)


def _already_bound(root: Path, journal: Journal, request: BindRequest) -> Report | None:
    record = next((r for r in journal.records() if r.bdf == request.bdf), None)
    if record is None or not is_same_drive(root, record):
        return None  # a record of an earlier boot or an unplugged drive will be overwritten
    if record.serial != request.serial:
        found = f"{record.bdf} was bound as {record.serial!r}, not {request.serial!r}"
        raise refuse(Code.SERIAL_MISMATCH, found)
    if record.state != BOUND or read_driver(root, record.bdf) != VFIO_DRIVER:
        raise refuse(Code.UNFINISHED, f"give it back first: restore {record.bdf}")
    if request.persist:
        found = "it is already bound: restore it, then bind it with --persist"
        raise refuse(Code.UNFINISHED, found)
    line = f"{record.bdf} ({record.serial}) is already bound to {VFIO_DRIVER}"
    return Report(DONE, [line], _fields(record, "bound"))


def _consents(root: Path, journal: Journal, request: BindRequest, facts: Facts) -> bool:
    """Whether the user has consented to exactly what is on the drive."""
    if facts.contents is None or not facts.contents.findings:
        return False
    if request.kinds is not None:
        return facts.contents.kinds <= request.kinds | {"spdk_kv"}
    shown = [reason.found for reason in facts.contents.findings]
    boot_id = read_boot_id(root)
    if request.destroys is not None and journal.was_shown(
        request.bdf, request.serial, boot_id, shown
    ):
        return True
    if facts.serial == request.serial:
        journal.write_shown(request.bdf, request.serial, boot_id, shown)
    return False


def _refused(reasons: tuple[Reason, ...], facts: Facts) -> Report:
    report = refusal(reasons)
    others = [r for r in reasons if r.code not in (*CONTENT_CODES, Code.NOT_SHOWN)]
    if others:
        return report
    hint = (
        "Binding erases nothing, but whatever then uses the drive will overwrite this. If all of "
        f"it may be lost, add --i-know-this-destroys {facts.serial}"
    )
    return replace(report, lines=[*report.lines, hint])


def _plan(request: BindRequest, facts: Facts) -> Report:
    sizes = sum(disk.nbytes for disk in facts.disks)
    lines = [
        f"{facts.bdf}: {facts.model}, serial {facts.serial}, {sizes} bytes, "
        f"IOMMU group {facts.group}",
        *([facts.contents.note] if facts.contents and facts.contents.note else []),
        f"would move it from the driver {facts.driver} to {VFIO_DRIVER}",
        "dry run, nothing was changed: add --yes to do it",
    ]
    fields = {"bdf": facts.bdf, "serial": facts.serial, "state": "free", "dry_run": True}
    return Report(DONE, lines, fields)


def _take(
    root: Path,
    kernel: WritableKernel,
    journal: Journal,
    request: BindRequest,
    before: Facts,
    consent: bool,
    persistence: Persistence,
) -> Report:
    assert before.driver is not None
    assert before.group is not None
    record = Record(
        bdf=before.bdf,
        serial=request.serial,
        model=before.model,
        former_driver=before.driver,
        former_override=before.override,
        group=before.group,
        boot_id=read_boot_id(root),
        inode=before.inode,
        state=BINDING,
    )
    with claim(root, kernel, before.disks) as claims:
        if claims.refusals:
            return _refused(tuple(claims.refusals), before)
        look_again = _second_look(root, kernel, request, before, consent)
        with signals_deferred():
            try:
                for step in bind_steps(root, kernel, journal, record, look_again):
                    if step == "probe":
                        claims.release()  # the old driver has released the drive
                if request.persist:
                    kinds = before.contents.kinds if before.contents and consent else set()
                    # After all contents were given up, a boot will find unknown data there.
                    persistence.add(request.serial, kinds | {"data"} if consent else kinds)
            except Refused as error:
                claims.release()
                trouble = _undo(root, kernel, journal, record)
                if trouble is None:
                    return refusal(error.reasons)
                return _failed(record, str(error), trouble)
            except Exception as error:  # whatever failed, the drive goes back to the kernel
                claims.release()
                return _failed(record, str(error), _undo(root, kernel, journal, record))
    lines = [
        f"{record.bdf} ({record.serial}) is bound to {VFIO_DRIVER}, IOMMU group {record.group}",
        f"open it as spdk://{record.bdf}/1; give it back with: restore {record.bdf}",
    ]
    if request.persist:
        lines.append("it will be checked and bound again at every boot")
    return Report(DONE, lines, _fields(record, "bound"))


def _second_look(
    root: Path, kernel: WritableKernel, request: BindRequest, before: Facts, consent: bool
) -> Callable[[], None]:
    def look_again() -> None:
        now = read_facts(root, kernel, request.bdf, claimed=True)
        reasons = reasons_against(now, request.serial)
        if consent:
            reasons = without_contents(reasons)
        if now.override != VFIO_DRIVER:  # which bind_steps has just set
            found = f"its driver_override is {now.override!r}, not {VFIO_DRIVER!r}"
            reasons = (*reasons, Reason(Code.CHANGED, found))
        now = replace(now, override=before.override)
        reasons = (*reasons, *changes(before, now))
        if reasons:
            raise Refused(reasons)

    return look_again


def _undo(root: Path, kernel: WritableKernel, journal: Journal, record: Record) -> str | None:
    """Puts everything back. Returns why that failed, None if it did not."""
    try:
        for _ in give_back_steps(root, kernel, journal, record):
            pass
    except Exception as error:
        return str(error)
    return None


def _failed(record: Record, failure: str, trouble: str | None) -> Report:
    lines = [f"failed: {failure}"]
    if trouble is None:
        lines.append(f"rolled back: the driver {record.former_driver} has {record.bdf} again")
    else:
        lines += [f"rollback failed: {trouble}", f"try: restore {record.bdf}"]
    fields = _fields(record, "unfinished" if trouble else "free")
    return Report(FAILED, lines, fields | {"failure": failure, "rolled_back": trouble is None})


def _fields(record: Record, state: str) -> dict[str, object]:
    node = f"/dev/vfio/{record.group}"
    return {"bdf": record.bdf, "serial": record.serial, "state": state, "vfio_node": node}
