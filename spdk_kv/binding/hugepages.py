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
    """Raises the number of hugepages of the default size to ``amount``. Raises Refused.

    If the kernel cannot find as many, those that it found are kept, as some process may already use
    them.

    Args:
        root: the folder that stands for ``/``.
        kernel: what writes.
        amount: a number of pages, or a size with a unit such as ``2 GiB``.
    """
    if not kernel.is_root():
        raise refuse(Code.NOT_ROOT, "only root may reserve hugepages")
    page = read_meminfo(root).get("Hugepagesize")
    if not page:
        raise Unreadable(f"{root / 'proc/meminfo'}: does not show the size of a hugepage")
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
            "those that were found stay reserved; try again right after a boot, or put "
            f"hugepages={wanted} on the kernel's command line",
        ]
        return Report(FAILED, lines, fields | {"failure": "not enough contiguous memory"})
    change = f"{before} before" if now != before else "as before"
    return Report(DONE, [f"{now} hugepages of {size} ({change})", *memlock_lines(None)], fields)


def memlock_lines(group: str | None) -> list[str]:
    """How much memory this process may lock, which limits what it may give to a drive for DMA."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else format_nbytes(soft)
    who = f"@{group}" if group else "USER"
    return [
        f"locked memory: {shown} for this process; whatever drives a drive needs enough for all "
        f"its DMA memory: '{who} - memlock unlimited' in /etc/security/limits.d/spdk_kv.conf, or "
        "LimitMEMLOCK=infinity in its systemd unit"
    ]


def _pages(amount: str, page: int) -> int:
    try:
        if amount.strip().isdigit():
            return int(amount)
        return align_up(parse_nbytes(amount), page) // page
    except ValueError as error:
        raise refuse(Code.NOT_POSSIBLE, str(error)) from error


def _check_memory(root: Path, page: int, more: int) -> None:
    """Raises Refused for more than the memory available, which would leave the machine without."""
    free = read_meminfo(root).get("MemAvailable")
    if free is None:
        raise Unreadable(f"{root / 'proc/meminfo'}: does not show the memory available")
    if more * page > free:
        found = f"needs {format_nbytes(more * page)} more, of {format_nbytes(free)} available"
        raise refuse(Code.NOT_POSSIBLE, found)
