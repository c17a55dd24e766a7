"""The command ``hugepages``: raises the number of hugepages, and never lowers it."""

from __future__ import annotations

import resource
from pathlib import Path

from spdk_kv.binding.journal import Journal
from spdk_kv.binding.kernel import WritableKernel
from spdk_kv.binding.report import DONE, FAILED, Report
from spdk_kv.devices import read_meminfo
from spdk_kv.devices.inspection import Code, Unreadable, refuse, required_count
from spdk_kv.units import KIB, align_up, format_nbytes, parse_nbytes


def hugepages(root: Path, kernel: WritableKernel, amount: str) -> Report:
    """Sees to it that there are ``amount`` hugepages of the default size.

    ``amount``: a number of pages, or a size with its unit, as ``2 GiB``. Raises Refused. Pages
    that the kernel could not find at once stay out; those that it found are kept even then, as
    someone may use them already.
    """
    if not kernel.is_root():
        raise refuse(Code.NOT_ROOT, "only root may reserve hugepages")
    page = read_meminfo(root).get("Hugepagesize")
    if not page:
        raise Unreadable(f"{root / 'proc/meminfo'}: does not tell the size of a hugepage")
    wanted = _pages(amount, page)
    attribute = root / f"sys/kernel/mm/hugepages/hugepages-{page // KIB}kB/nr_hugepages"
    with Journal(root).locked():
        before = required_count(attribute)
        _check_memory(root, page, wanted - before)
        try:
            if wanted > before:
                kernel.write(attribute, str(wanted))
            now = required_count(attribute)
        except (OSError, Unreadable) as error:
            return Report(FAILED, [f"failed: {error}"], {"failure": str(error)})
    size = f"{format_nbytes(page)} each"
    fields = {"page_nbytes": page, "before": before, "wanted": wanted, "now": now}
    if now < wanted:
        lines = [
            f"failed: {now} hugepages of {size}, not {wanted}: memory is too fragmented",
            "those there are stay (this tool never lowers the number); try after a reboot, or "
            f"put hugepages={wanted} on the kernel's command line",
        ]
        return Report(FAILED, lines, fields | {"failure": "not enough contiguous memory"})
    change = f"{before} before" if now != before else "as before"
    return Report(DONE, [f"{now} hugepages of {size} ({change})", *memlock_lines(None)], fields)


def memlock_lines(group: str | None) -> list[str]:
    """How much memory a process may lock, which is as much as it may give a drive for DMA."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else format_nbytes(soft)
    who = f"@{group}" if group else "USER"
    return [
        f"locked memory: {shown} for this process; others need room for all that they give to "
        f"the drive: '{who} - memlock unlimited' in /etc/security/limits.d/spdk_kv.conf, or "
        "LimitMEMLOCK=infinity in their unit"
    ]


def _pages(amount: str, page: int) -> int:
    try:
        if amount.strip().isdigit():
            return int(amount)
        return align_up(parse_nbytes(amount), page) // page
    except ValueError as error:
        raise refuse(Code.NOT_POSSIBLE, str(error)) from error


def _check_memory(root: Path, page: int, more: int) -> None:
    """Hugepages are taken from all others at once: too many and the machine is out of memory."""
    available = read_meminfo(root).get("MemAvailable")
    if available is None:
        raise Unreadable(f"{root / 'proc/meminfo'}: does not tell the memory available")
    if more * page > available:
        found = f"{format_nbytes(more * page)} more are asked for, {format_nbytes(available)} free"
        raise refuse(Code.NOT_POSSIBLE, found)
