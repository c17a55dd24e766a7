"""A real NVMe target for the tests: SPDK's nvmf_tgt, bdevs in memory, over vfio-user and TCP."""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.spdk.drives import NQN, SETTINGS, drives, rpc
from spdk_kv.engines.spdk import environment
from spdk_kv.errors import DeviceGone, EngineUnavailable
from support.waiting import PATIENCE_S, wait_until

SERIAL = "SPDKKV01"
# Of linux/mman.h.
_MAP_HUGETLB, _MAP_HUGE_2MB = 0x40000, 21 << 26
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def why_not() -> str | None:
    """Why no target can run here, or None."""
    if missing := environment.why_unavailable():
        return f"spdk_kv was {missing[0]}"
    if shutil.which("nvmf_tgt") is None:
        return "SPDK's nvmf_tgt is not on the PATH"
    if os.geteuid() != 0:
        return "the target needs root (hugepages)"
    return None


@pytest.fixture(scope="module")
def target_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A target without namespaces, for the tests of one module; they are skipped where none can
    run. SPDK is set up in this process without hugepages: those are their own tests' business."""
    if reason := why_not():
        pytest.skip(reason)
    with contextlib.suppress(EngineUnavailable):
        # Set up by another module's tests already, and in the same way.
        environment.configure(SETTINGS)
    target = Target(tmp_path_factory.mktemp("target"))
    try:
        yield target
    finally:
        target.close()


@pytest.fixture(scope="module")
def drives_fixture(target: Target) -> Iterator[None]:
    """For the tests of one module stores in folders have their data on namespaces of ``target``,
    over vfio-user."""
    target.listen()
    with drives(target.folder, target.rpc_path, target.uri("vfiouser").removesuffix("/1")):
        yield


def wait_until_back(use: Callable[[], object]) -> None:
    """Waits until ``use`` of a drive that went away succeeds."""

    def is_back() -> bool:
        with contextlib.suppress(DeviceGone):
            use()
            return True
        return False

    wait_until(is_back, "the drive does not come back")


@contextlib.contextmanager
def hugepages(nbytes: int) -> Iterator[None]:
    """At least ``nbytes`` of free 2 MiB pages while it lasts; the pool is then as it was."""
    free, promised = (
        int((_HUGEPAGES.parent / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
    )
    before = int(_HUGEPAGES.read_text())
    wanted = before + max(0, (nbytes >> 21) - free + promised)
    _HUGEPAGES.write_text(str(wanted))
    if int(_HUGEPAGES.read_text()) < wanted:  # memory is in too small pieces
        Path("/proc/sys/vm/compact_memory").write_text("1")
        _HUGEPAGES.write_text(str(wanted))
    # Others may add and take pages at the same time: only what was added here is taken back.
    added = int(_HUGEPAGES.read_text()) - before
    try:
        if before + added < wanted:
            pytest.skip(f"no {nbytes >> 20} MiB of huge pages to be had, only {added} pages of it")
        yield
    finally:
        _HUGEPAGES.write_text(str(max(0, int(_HUGEPAGES.read_text()) - added)))


@contextlib.contextmanager
def hugepages_taken() -> Iterator[None]:
    """No 2 MiB page is free while it lasts, as on a machine where none were reserved."""
    free, promised = (
        int((_HUGEPAGES.parent / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
    )
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | _MAP_HUGE_2MB
    # Promised, and not touched: that is as good as taken.
    held = mmap.mmap(-1, (free - promised) << 21, flags) if free > promised else None
    try:
        yield
    finally:
        if held is not None:
            held.close()


class Target:
    """A running nvmf_tgt. One subsystem, its namespaces numbered from 1 in the order added."""

    memory_mib = 1024

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rpc_path = folder / "rpc.sock"
        self.port = _free_port()
        self.sockets = folder / "vfio-user"
        self.sockets.mkdir()
        self.log = (folder / "nvmf_tgt.log").open("wb")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # The last core, so that the tests' own threads find one that does not spin.
        core = max(os.sched_getaffinity(0))
        command = ["nvmf_tgt", "--no-pci", "--no-huge", "-s", str(self.memory_mib)]
        command += ["--disable-cpumask-locks", "-m", f"[{core}]", "-r", str(self.rpc_path)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        try:
            self._wait_ready(process)
            self.rpc("nvmf_create_transport", trtype="VFIOUSER")
            self.rpc("nvmf_create_transport", trtype="TCP")
            self.rpc("nvmf_create_subsystem", nqn=NQN, allow_any_host=True, serial_number=SERIAL)
        except BaseException:
            process.kill()
            process.wait()
            raise
        self.namespaces = 0
        return process

    def restart(self) -> None:
        """A new target, without namespaces, in the place of one that was killed."""
        for left in (self.rpc_path, self.rpc_path.with_suffix(".sock.lock")):
            left.unlink(missing_ok=True)
        for left in self.sockets.iterdir():
            left.unlink()
        self.process = self._start()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.rpc("spdk_get_version")
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = (self.folder / "nvmf_tgt.log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"nvmf_tgt did not start:\n{tail}") from None
                time.sleep(0.05)
            else:
                return

    def rpc(self, method: str, **parameters: Any) -> Any:
        """One JSON-RPC call; RuntimeError where the target refuses it."""
        return rpc(self.rpc_path, method, **parameters)

    def add_namespace(
        self, nbytes: int, block_nbytes: int, *, delay_s: float = 0.0, nsid: int | None = None
    ) -> int:
        """A namespace on a new bdev in memory; returns its number. ``delay_s``: how long each of
        its reads takes. ``nsid``: its number, if not the next one; its identity counts on."""
        number = self.namespaces + 1
        name = f"Malloc{number}"
        self.rpc(
            "bdev_malloc_create",
            name=name,
            num_blocks=nbytes // block_nbytes,
            block_size=block_nbytes,
            # So that it is the same one to whoever meets it after a restart.
            uuid=f"00000000-0000-4000-8000-{number:012}",
        )
        if delay_s:
            fast = 1
            slow = round(delay_s * 1e6)
            self.rpc(
                "bdev_delay_create",
                base_bdev_name=name,
                name=f"Slow{number}",
                avg_read_latency=slow,
                p99_read_latency=slow,
                avg_write_latency=fast,
                p99_write_latency=fast,
            )
            name = f"Slow{number}"
        self.rpc(
            "nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": name, "nsid": nsid or number}
        )
        self.namespaces = number
        return nsid or number

    def add_file(self, image: Path) -> int:
        """A namespace whose bytes are a file's, so that they outlive the target."""
        number = self.namespaces + 1
        name = f"File{number}"
        identity = f"00000000-0000-4000-8000-{number:012}"
        self.rpc("bdev_aio_create", name=name, filename=str(image), block_size=4096, uuid=identity)
        namespace = {"bdev_name": name, "nsid": number}
        self.rpc("nvmf_subsystem_add_ns", nqn=NQN, namespace=namespace)
        self.namespaces = number
        return number

    def remove_namespace(self, nsid: int) -> None:
        """Takes a namespace made by :meth:`add_namespace` away, and its memory."""
        self.rpc("nvmf_subsystem_remove_ns", nqn=NQN, nsid=nsid)
        self.rpc("bdev_malloc_delete", name=f"Malloc{nsid}")

    def listen(self) -> None:
        """Opens both ways in; after the namespaces were added."""
        self.rpc(
            "nvmf_subsystem_add_listener",
            nqn=NQN,
            listen_address={"trtype": "VFIOUSER", "traddr": str(self.sockets), "trsvcid": "0"},
        )
        self.rpc(
            "nvmf_subsystem_add_listener",
            nqn=NQN,
            listen_address={
                "trtype": "TCP",
                "adrfam": "IPv4",
                "traddr": "127.0.0.1",
                "trsvcid": str(self.port),
            },
        )

    def uri(self, transport: str, nsid: int = 1) -> str:
        """The location of a namespace over ``vfiouser`` or ``tcp``."""
        if transport == "tcp":
            return f"spdk+tcp://127.0.0.1:{self.port}/{NQN}/{nsid}"
        return f"spdk+vfiouser://{self.sockets}/{NQN}/{nsid}"

    def kill(self) -> None:
        """As a drive that is pulled."""
        self.process.kill()
        self.process.wait()
        self._clear()

    def _clear(self) -> None:
        """Removes what a killed target leaves behind."""
        number = self.process.pid
        for pattern in (
            f"/dev/hugepages/spdk_pid{number}map_*",
            f"/dev/shm/*_trace.pid{number}",
            f"/var/tmp/spdk_pci_lock_*_{number}",
        ):
            for left in glob.glob(pattern):
                Path(left).unlink(missing_ok=True)
        shutil.rmtree(f"/var/run/dpdk/spdk_pid{number}", ignore_errors=True)

    def close(self) -> None:
        """Ends the target."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._clear()
        self.log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
