"""The doctor's checks: pure functions from what was read of a machine to findings and remedies.

Being pure, they can be tested for machines that are not at hand.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spdk_kv.devices import Host, IoUringStatus, NvmeDrive
from spdk_kv.engines import URING_OLDEST_KERNEL
from spdk_kv.memory import MemorySnapshot, available_for_page_cache
from spdk_kv.units import GIB, format_nbytes

Status = Literal["ok", "missing", "limited", "info"]

# What the SPDK engine may pin: its own rings, and a staging pool for two deep pipelines of large
# layers. This is 1024 hugepages of 2 MiB.
PINNED_NBYTES = 2 * GIB


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; ``remedy`` is a command or advice, "" if none is needed."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def check_system(host: Host) -> Check:
    found = f"Linux {host.kernel}, {host.cpu_count} usable CPUs"
    if host.container_hints:
        found += (
            f"; probably in a container ({', '.join(host.container_hints)}): run sysctl and "
            "modprobe, and change the kernel's command line, on the host"
        )
    return Check("system", "info", found)


def check_memory(memory: MemorySnapshot) -> Check:
    if memory.available_nbytes is None:
        return Check(
            "memory", "limited", "cannot read MemAvailable", "sudo mount -t proc proc /proc"
        )
    found = f"{format_nbytes(memory.available_nbytes)} available"
    tightest = memory.tightest
    if tightest is None:
        return Check("memory", "ok", f"{found}, no cgroup limit")
    available = format_nbytes(available_for_page_cache(memory, 0))
    found += (
        f", of which the page cache may use {available}: cgroup {tightest.path} has"
        f" a limit of {format_nbytes(tightest.limit_nbytes)}"
    )
    if tightest.headroom_nbytes >= memory.available_nbytes:
        return Check("memory", "ok", found)
    remedy = (
        "raise the cgroup's limit: `docker run --memory=...`, or MemoryMax= of the systemd unit"
    )
    return Check("memory", "limited", found, remedy)


def check_hugepages(host: Host) -> Check:
    if host.hugepage_nbytes is None or not host.hugepage_pools:
        remedy = "boot a kernel that has CONFIG_HUGETLBFS"
        return Check("hugepages", "missing", "the kernel does not support them", remedy)
    pools = [
        f"{pool.free} of {pool.total} pages of {format_nbytes(pool.page_nbytes)} free"
        for pool in host.hugepage_pools
    ]
    mounts = ", ".join(host.hugepage_mounts)
    found = (
        f"{'; '.join(pools)}; {f'mounted at {mounts}' if mounts else 'hugetlbfs is not mounted'}"
    )
    free_nbytes = sum(pool.free * pool.page_nbytes for pool in host.hugepage_pools)
    remedies = []
    if free_nbytes < PINNED_NBYTES:
        # vm.nr_hugepages sets the total of the default size: a number below today's would take
        # pages from other users.
        total = sum(p.total for p in host.hugepage_pools if p.page_nbytes == host.hugepage_nbytes)
        more = -(-(PINNED_NBYTES - free_nbytes) // host.hugepage_nbytes)
        remedies.append(f"sudo sysctl vm.nr_hugepages={total + more}")
    if not mounts:
        remedies.append(
            "sudo mkdir -p /dev/hugepages && sudo mount -t hugetlbfs hugetlbfs /dev/hugepages"
        )
    status: Status = "missing" if not free_nbytes else "limited" if remedies else "ok"
    return Check("hugepages", status, found, " && ".join(remedies))


def check_memlock(host: Host) -> Check:
    if host.memlock_nbytes is None:
        return Check("memlock", "ok", "RLIMIT_MEMLOCK is unlimited")
    found = f"RLIMIT_MEMLOCK is {format_nbytes(host.memlock_nbytes)}"
    if host.memlock_exempt:
        return Check("memlock", "ok", f"{found}, but this process has CAP_IPC_LOCK")
    if host.memlock_nbytes >= PINNED_NBYTES:
        return Check("memlock", "ok", found)
    remedy = (
        "`ulimit -l unlimited`, or permanently: echo '* - memlock unlimited' | "
        "sudo tee /etc/security/limits.d/spdk_kv.conf, then log in again"
    )
    return Check("memlock", "limited", found, remedy)


def check_iommu(host: Host) -> Check:
    if host.iommu:
        return Check("iommu", "ok", f"{host.iommu_groups} IOMMU groups")
    units = ", ".join(host.iommu_units)
    found = f"{units} is present, but there are no IOMMU groups" if units else "none in use"
    remedy = (
        "enable VT-d or AMD-Vi in the firmware, add intel_iommu=on iommu=pt to the kernel's "
        "command line (AMD: iommu=pt) and reboot"
    )
    return Check("iommu", "missing", found, remedy)


def check_vfio(host: Host) -> Check:
    if host.vfio_pci == "loaded":
        return Check("vfio", "ok", "vfio-pci is loaded")
    if host.vfio_pci == "available":
        return Check("vfio", "limited", "vfio-pci is not loaded", "sudo modprobe vfio-pci")
    found = f"vfio-pci is neither loaded nor in /lib/modules/{host.kernel}"
    remedy = "boot a kernel that has CONFIG_VFIO_PCI, then sudo modprobe vfio-pci"
    return Check("vfio", "missing", found, remedy)


def check_io_uring(io_uring: IoUringStatus) -> Check:
    if io_uring.available:
        return Check("io_uring", "ok", io_uring.reason)
    if io_uring.too_old:
        remedy = f"boot Linux {URING_OLDEST_KERNEL} or newer"
        return Check("io_uring", "missing", io_uring.reason, remedy)
    if io_uring.sysctl:
        found = f"{io_uring.reason}; kernel.io_uring_disabled={io_uring.sysctl}"
        return Check("io_uring", "missing", found, "sudo sysctl kernel.io_uring_disabled=0")
    if io_uring.error == errno.ENOMEM:
        # Before Linux 5.12 the rings count as locked memory.
        return Check("io_uring", "missing", io_uring.reason, "ulimit -l unlimited")
    remedy = (
        "allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile "
        "(to try: `docker run --security-opt seccomp=unconfined`)"
    )
    if io_uring.error == errno.ENOSYS:
        remedy += f", or boot Linux {URING_OLDEST_KERNEL} or newer"
    return Check("io_uring", "missing", io_uring.reason, remedy)


def check_drives(drives: Sequence[NvmeDrive]) -> list[Check]:
    """One line per drive, or one line that says there is none."""
    if not drives:
        return [Check("nvme", "missing", "no NVMe drive on PCI; file:// works on any drive")]
    return [Check(f"nvme {drive.bdf}", "info", _describe(drive)) for drive in drives]


def _describe(drive: NvmeDrive) -> str:
    size = "unknown size" if drive.nbytes is None else format_nbytes(drive.nbytes)
    facts = [
        drive.model or "unknown model",
        f"serial {drive.serial}" if drive.serial else "unknown serial",
        size,
        f"driver {drive.driver}" if drive.driver else "no driver",
    ]
    facts += [ns.block_node or ns.generic_node or ns.name for ns in drive.namespaces]
    if drive.mounted:
        facts.append(f"mounted at {' '.join(drive.mount_points)}")
    elif drive.driver == "nvme":
        facts.append("not mounted")
    holders = sorted({holder for ns in drive.namespaces for holder in ns.holders})
    if holders:
        facts.append(f"used by {' '.join(holders)}")
    if drive.iommu_group is None:
        facts.append("no IOMMU group")
    else:
        facts.append(f"IOMMU group {drive.iommu_group}")
    if drive.shares_iommu_group:
        others = [member for member in drive.iommu_group_members if member != drive.bdf]
        facts.append(f"shared with {' '.join(others)}")
    return ", ".join(facts)
