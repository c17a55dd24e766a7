"""The command ``permissions``: gives a group access to exactly one VFIO node, by a udev rule.

The rule is in /run, because after a boot the node's number may belong to another PCI function. A
binding that is made again at boot gets a new rule.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from spdk_kv.binding.bind import check_bdf, is_same_drive
from spdk_kv.binding.hugepages import memlock_lines
from spdk_kv.binding.journal import BOUND, Journal, Record, replace_file
from spdk_kv.binding.persist import Persistence
from spdk_kv.binding.report import DONE, FAILED, Report
from spdk_kv.devices.inspection import (
    Code,
    Kernel,
    ToolMissing,
    function_path,
    listing,
    optional_link_name,
    read_driver,
    refuse,
)

_RULES = "run/udev/rules.d"
_MODE = 0o660


def permissions(
    root: Path, kernel: Kernel, bdf: str, group: str, persistence: Persistence
) -> Report:
    """Gives ``group`` read and write access to the VFIO node of ``bdf``. Raises Refused."""
    check_bdf(bdf)
    if not kernel.is_root():
        raise refuse(Code.NOT_ROOT, "only root may change permissions")
    with Journal(root).locked():
        return _grant(root, kernel, bdf, group, persistence)


def _grant(root: Path, kernel: Kernel, bdf: str, group: str, persistence: Persistence) -> Report:
    record = _bound_record(root, bdf)
    gid = _gid(kernel, group)
    node = root / "dev/vfio" / record.group
    before = node.lstat()
    rule = root / _RULES / _rule_name(bdf)
    text = (
        f"# {bdf}, serial {record.serial}: written by spdk_kv; restore removes it.\n"
        f'SUBSYSTEM=="vfio", KERNEL=="{record.group}", GROUP="{group}", MODE="{_MODE:04o}"\n'
    )
    persistence.entries()  # may refuse, so it comes before the first change
    try:
        rule.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        replace_file(rule, text, 0o644)
        # Takes effect at once and without udev; the rule is for when the node is created anew.
        os.chown(node, -1, gid, follow_symlinks=False)
        os.chmod(node, _MODE)
        persistent = persistence.set_group(record.serial, group)
    except OSError as error:
        return _put_back(rule, node, before, error)
    _reload(kernel)
    shown = f"/dev/vfio/{record.group}"
    lines = [f"group {group} may use {shown}, and with it {bdf} ({record.serial})"]
    lines += memlock_lines(group)
    if not persistent:
        lines.append("until the next boot; a binding made with --persist keeps it")
    return Report(DONE, lines, {"bdf": bdf, "group": group, "vfio_node": shown})


def _put_back(rule: Path, node: Path, before: os.stat_result, failure: OSError) -> Report:
    try:
        rule.unlink(missing_ok=True)
        os.chown(node, -1, before.st_gid, follow_symlinks=False)
        os.chmod(node, before.st_mode & 0o7777)
    except OSError as error:
        lines = [f"failed: {failure}", f"rollback failed: {error}; check {node}"]
        return Report(FAILED, lines, {"failure": str(failure), "rolled_back": False})
    lines = [f"failed: {failure}", "rolled back"]
    return Report(FAILED, lines, {"failure": str(failure), "rolled_back": True})


def withdraw(root: Path, kernel: Kernel, bdf: str) -> None:
    """Removes the rule for ``bdf``; its node is gone with the binding. Raises OSError."""
    rule = root / _RULES / _rule_name(bdf)
    if rule.exists():
        rule.unlink()
        _reload(kernel)


def _rule_name(bdf: str) -> str:
    return f"70-spdk-kv-{bdf.replace(':', '-')}.rules"


def _bound_record(root: Path, bdf: str) -> Record:
    record = next((r for r in Journal(root).records() if r.bdf == bdf), None)
    if record is None or record.state != BOUND or not is_same_drive(root, record):
        raise refuse(Code.NOT_OURS, f"this tool has not bound {bdf}")
    group = optional_link_name(function_path(root, bdf) / "iommu_group")
    if read_driver(root, bdf) != "vfio-pci" or group != record.group:
        raise refuse(Code.CHANGED, f"{bdf} is no longer bound the way this tool bound it")
    members = listing(root / "sys/kernel/iommu_groups" / record.group / "devices")
    if members != (bdf,):
        raise refuse(Code.IOMMU_SHARED, f"IOMMU group {record.group} holds {', '.join(members)}")
    if not (root / "dev/vfio" / record.group).exists():
        raise refuse(Code.NOT_FOUND, f"/dev/vfio/{record.group} does not exist")
    return record


def _gid(kernel: Kernel, group: str) -> int:
    # What groupadd(8) accepts: the name goes into a rule that udev reads as root.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", group):
        raise refuse(Code.NOT_FOUND, f"{group!r} is not the name of a group")
    try:
        return kernel.group_id(group)
    except KeyError:
        raise refuse(Code.NOT_FOUND, f"there is no group {group!r}: groupadd {group}") from None


def _reload(kernel: Kernel) -> None:
    # Without udev there is nothing to reload.
    with suppress(ToolMissing, OSError):
        kernel.run(["udevadm", "control", "--reload"])
