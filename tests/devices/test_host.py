"""The host's offer: fake trees for what differs between machines, this very one for the probes."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from spdk_kv.devices.host import HugepagePool, read_host, read_meminfo
from spdk_kv.devices.io_uring import probe_io_uring

MIB = 1 << 20
GIB = 1 << 30

# Installs a seccomp filter (linux/seccomp.h) that fails io_uring_setup with argv's errno, as
# container managers do, and prints what the probe then says.
FILTERED_PROBE = """
import ctypes, struct, sys
refusal = 0x00050000 | int(sys.argv[1])
program = b"".join([
    struct.pack("HBBI", 0x20, 0, 0, 0),           # load the syscall's number
    struct.pack("HBBI", 0x15, 0, 1, 425),         # io_uring_setup?
    struct.pack("HBBI", 0x06, 0, 0, refusal),     # then SECCOMP_RET_ERRNO
    struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000),  # else SECCOMP_RET_ALLOW
])
buffer = ctypes.create_string_buffer(program)
fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, fprog, 0, 0) == 0, "PR_SET_SECCOMP"
from spdk_kv.devices.io_uring import probe_io_uring
status = probe_io_uring()
print(status.available, status.error)
"""


def write(root: Path, path: str, content: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n")


def test_this_machine_is_read_as_it_is() -> None:
    host = read_host()
    assert host.kernel == os.uname().release
    assert host.cpu_count == len(os.sched_getaffinity(0))
    assert host.available_nbytes is not None
    assert 0 < host.available_nbytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host.iommu == bool(os.listdir("/sys/kernel/iommu_groups"))


def test_empty_root_offers_nothing_and_raises_nothing(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    assert (host.hugepage_pools, host.hugepage_mounts, host.container_hints) == ((), (), ())
    assert (host.available_nbytes, host.hugepage_nbytes) == (None, None)
    assert (host.iommu, host.vfio_pci, host.memlock_exempt) == (False, "missing", False)


def test_hugepages_of_each_size_and_their_mounts(tmp_path: Path) -> None:
    base = "sys/kernel/mm/hugepages"
    for name, total, free, promised in (
        ("hugepages-1048576kB", 2, 1, 0),
        ("hugepages-2048kB", 1024, 1000, 40),
    ):
        write(tmp_path, f"{base}/{name}/nr_hugepages", str(total))
        write(tmp_path, f"{base}/{name}/free_hugepages", str(free))
        write(tmp_path, f"{base}/{name}/resv_hugepages", str(promised))
    write(tmp_path, f"{base}/hugepages-64kB/nr_hugepages", "nonsense")
    write(
        tmp_path,
        "proc/meminfo",
        "MemTotal:  100 kB\nHugepagesize:       2048 kB\nHugePages_Free: 7",
    )
    write(
        tmp_path,
        "proc/self/mountinfo",
        "40 2 0:40 / /dev/hugepages rw shared:1 - hugetlbfs hugetlbfs rw,pagesize=2M\n"
        "41 2 0:41 / /dev/shm rw shared:2 - tmpfs tmpfs rw",
    )
    host = read_host(tmp_path)
    # Pages that are free but promised to a mapping are not for us.
    assert host.hugepage_pools == (
        HugepagePool(2 * MIB, total=1024, free=960),
        HugepagePool(GIB, total=2, free=1),
    )
    assert host.hugepage_nbytes == 2 * MIB
    assert host.hugepage_mounts == ("/dev/hugepages",)
    assert read_meminfo(tmp_path) == {"MemTotal": 102400, "Hugepagesize": 2 * MIB}


def test_iommu_counts_groups_not_units(tmp_path: Path) -> None:
    (tmp_path / "sys/class/iommu/dmar0").mkdir(parents=True)
    (tmp_path / "sys/kernel/iommu_groups").mkdir(parents=True)
    assert (read_host(tmp_path).iommu, read_host(tmp_path).iommu_units) == (False, ("dmar0",))
    (tmp_path / "sys/kernel/iommu_groups/0").mkdir()
    assert read_host(tmp_path).iommu


def test_vfio_pci_loaded_available_or_missing(tmp_path: Path) -> None:
    write(tmp_path, "proc/sys/kernel/osrelease", "6.1.0-test")
    modules = "lib/modules/6.1.0-test/modules.dep"
    write(tmp_path, modules, "kernel/drivers/vfio/pci/vfio-pci-core.ko.zst: kernel/x.ko")
    assert read_host(tmp_path).vfio_pci == "missing"
    write(tmp_path, modules, "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/x.ko")
    assert read_host(tmp_path).vfio_pci == "available"
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    assert read_host(tmp_path).vfio_pci == "loaded"


@pytest.mark.parametrize(
    ("path", "content", "hints"),
    [
        (".dockerenv", "", ("/.dockerenv",)),
        ("run/.containerenv", "", ("/run/.containerenv",)),
        ("proc/1/cgroup", "4:memory:/kubepods/besteffort/pod1/2", ("/proc/1/cgroup",)),
        ("proc/1/cgroup", "0::/init.scope", ()),
    ],
)
def test_container_hints(tmp_path: Path, path: str, content: str, hints: tuple[str, ...]) -> None:
    write(tmp_path, path, content)
    assert read_host(tmp_path).container_hints == hints


@pytest.mark.parametrize(
    ("effective", "exempt"), [("000001ffffffffff", True), ("0000000000004000", True),
                              ("00000000a80425fb", False), ("0000000000000000", False)],
)  # fmt: skip
def test_memlock_exemption_is_cap_ipc_lock(tmp_path: Path, effective: str, exempt: bool) -> None:
    write(
        tmp_path,
        "proc/self/status",
        f"Name:\tpython\nCapPrm:\tffffffffffffffff\nCapEff:\t{effective}",
    )
    assert read_host(tmp_path).memlock_exempt is exempt


def test_memlock_is_the_soft_limit_of_this_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
        assert read_host().memlock_nbytes == 65536
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOSYS])
def test_io_uring_probe_sees_a_seccomp_refusal(refusal: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FILTERED_PROBE, str(refusal)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.split() == ["False", str(refusal)], result.stderr


def test_io_uring_probe_gives_its_ring_back() -> None:
    before = os.listdir("/proc/self/fd")
    status = probe_io_uring()
    assert os.listdir("/proc/self/fd") == before
    # A refusal has an errno with it, and success none.
    assert status.available == (status.error is None)


def test_io_uring_probe_asks_the_kernel_rather_than_guessing() -> None:
    if not probe_io_uring().available:
        pytest.skip(f"io_uring is refused here: {probe_io_uring().reason}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # No descriptor left, so a real set-up cannot succeed.
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        status = probe_io_uring(Path("/nowhere"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (status.available, status.error) == (False, errno.EMFILE)
