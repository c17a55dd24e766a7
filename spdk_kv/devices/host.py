"""What the host offers for direct I/O: hugepages, locked memory, IOMMU, VFIO, io_uring."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spdk_kv.devices.io_uring import IoUringStatus, probe_io_uring
from spdk_kv.devices.mounts import read_mounts
from spdk_kv.devices.sysfs import entries, exists, parse_count, read_count, read_text
from spdk_kv.units import KIB

VfioState = Literal["loaded", "available", "missing"]

_CAP_IPC_LOCK = 14  # linux/capability.h
_POOL = re.compile(r"hugepages-(\d+)kB")
_CONTAINER_CGROUP = re.compile(r"docker|containerd|kubepods|libpod|lxc|crio")


@dataclass(frozen=True)
class HugepagePool:
    """The hugepages of one size; ``free`` excludes those that are already reserved."""

    page_nbytes: int
    total: int
    free: int


@dataclass(frozen=True)
class Host:
    """A snapshot of the machine.

    Attributes:
        hugepage_nbytes: the default page size, which vm.nr_hugepages counts.
        memlock_nbytes: the soft RLIMIT_MEMLOCK; None for unlimited.
        memlock_exempt: whether CAP_IPC_LOCK lifts that limit.
        iommu_units: IOMMUs that the kernel has found.
        vfio_pci: whether the driver is loaded (or built in), available as a module, or missing.
        container_hints: signs of a container; they are no proof.
    """

    kernel: str
    cpu_count: int
    available_nbytes: int | None
    hugepage_nbytes: int | None
    hugepage_pools: tuple[HugepagePool, ...]
    hugepage_mounts: tuple[str, ...]
    memlock_nbytes: int | None
    memlock_exempt: bool
    iommu_groups: int
    iommu_units: tuple[str, ...]
    vfio_pci: VfioState
    io_uring: IoUringStatus
    container_hints: tuple[str, ...]

    @property
    def iommu(self) -> bool:
        """Whether the kernel uses an IOMMU; an IOMMU without groups protects nothing."""
        return self.iommu_groups > 0


def read_host(root: Path = Path("/")) -> Host:
    """Reads the machine; limits and io_uring are always those of this process."""
    kernel = read_text(root / "proc/sys/kernel/osrelease") or os.uname().release
    memory = read_meminfo(root)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Host(
        kernel=kernel,
        # The CPUs that this process may run on; in a container often fewer than there are.
        cpu_count=len(os.sched_getaffinity(0)),
        available_nbytes=memory.get("MemAvailable"),
        hugepage_nbytes=memory.get("Hugepagesize"),
        hugepage_pools=_hugepage_pools(root),
        hugepage_mounts=tuple(m.mount_point for m in read_mounts(root) if m.fstype == "hugetlbfs"),
        memlock_nbytes=None if soft == resource.RLIM_INFINITY else soft,
        memlock_exempt=_has_capability(root, _CAP_IPC_LOCK),
        iommu_groups=len(entries(root / "sys/kernel/iommu_groups")),
        iommu_units=entries(root / "sys/class/iommu"),
        vfio_pci=vfio_pci_state(root, kernel),
        io_uring=probe_io_uring(root),
        container_hints=_container_hints(root),
    )


def read_meminfo(root: Path = Path("/")) -> dict[str, int]:
    """The fields of /proc/meminfo that are sizes, in bytes."""
    sizes: dict[str, int] = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        count = parse_count(number)
        if count is not None and unit == "kB":
            sizes[name] = count * KIB
    return sizes


def _hugepage_pools(root: Path) -> tuple[HugepagePool, ...]:
    base = root / "sys/kernel/mm/hugepages"
    pools = []
    for name in entries(base):
        match = _POOL.fullmatch(name)
        total = read_count(base / name / "nr_hugepages")
        free = read_count(base / name / "free_hugepages")
        if match is None or total is None or free is None:
            continue
        reserved = read_count(base / name / "resv_hugepages") or 0
        pools.append(HugepagePool(int(match[1]) * KIB, total, max(0, free - reserved)))
    return tuple(sorted(pools, key=lambda pool: pool.page_nbytes))


def _has_capability(root: Path, number: int) -> bool:
    status = read_text(root / "proc/self/status") or ""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> number & 1)


def vfio_pci_state(root: Path, kernel: str) -> VfioState:
    """Whether the kernel of release ``kernel`` has the driver vfio-pci, or could load it."""
    # A module and a built-in driver both have this directory.
    if exists(root / "sys/bus/pci/drivers/vfio-pci"):
        return "loaded"
    listing = read_text(root / "lib/modules" / kernel / "modules.dep") or ""
    return "available" if re.search(r"/vfio-pci\.ko(\.\w+)?:", listing) else "missing"


def _container_hints(root: Path) -> tuple[str, ...]:
    files = (".dockerenv", "run/.containerenv", "run/systemd/container")
    hints = [f"/{name}" for name in files if exists(root / name)]
    # Process 1's cgroup: even on a plain host our own may be named after a container manager.
    if _CONTAINER_CGROUP.search(read_text(root / "proc/1/cgroup") or ""):
        hints.append("/proc/1/cgroup")
    return tuple(hints)
