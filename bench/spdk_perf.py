"""SPDK's own spdk_nvme_perf as the yardstick, and a simulated drive that both sides can reach.

The drive is SPDK's nvmf_tgt with a bdev in memory, over vfio-user: the PCIe driver's own code, with
rings, doorbells and PRPs, and a thread of the target in the place of the drive. It takes one
client at a time, so whoever measures closes what it opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.units import GIB, MIB

LABEL = "simulated (SPDK target with its bytes in memory, over vfio-user)"
NQN = "nqn.2026-11.io.spdk-kv:bench"
BLOCK_NBYTES = 4096
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_PERF_MIB = 256


@dataclass(frozen=True)
class Perf:
    """What perf saw. It polls one core all the time, so its CPU time is the time that passes."""

    gib_s: float
    iops: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class SimulatedDrive:
    """``folder``: of the vfio-user socket; the cores of the drive and of whoever uses it."""

    folder: Path
    drive_core: int
    client_core: int

    @property
    def uri(self) -> str:
        return f"spdk+vfiouser://{self.folder}/{NQN}/1"

    def limit(self, mib_s: int) -> None:
        """Lets the drive move at most that much per second, as a real one would; 0: no limit."""
        request = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "bdev_set_qos_limit",
            "params": {"name": "Malloc0", "rw_mbytes_per_sec": mib_s},
        }
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "rpc.sock"))
            connection.sendall(json.dumps(request).encode())
            answer = json.loads(connection.recv(65536))
        if "error" in answer:
            raise RuntimeError(f"bdev_set_qos_limit: {answer['error']}")

    def perf(self, op: str, nbytes: int, depth: int, seconds: float) -> Perf:
        """One run of perf; ``op``: read, write or randread."""
        words = ["spdk_nvme_perf", "-c", hex(1 << self.client_core), "-s", str(_PERF_MIB), "-g"]
        words += ["-q", str(depth), "-o", str(nbytes), "-w", op, "-L"]
        words += ["-t", str(max(1, round(seconds)))]  # it takes whole seconds only
        words += ["-r", f"trtype:VFIOUSER traddr:{self.folder} subnqn:{NQN}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        total = re.search(r"^Total\s*:\s*([\d.]+)\s+([\d.]+)", done.stdout, re.M)
        if done.returncode or total is None:
            raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout)[-1000:].strip()}")
        iops = float(total[1])
        return Perf(
            iops * nbytes / GIB,
            iops,
            _quantile(done.stdout, "50.0"),
            _quantile(done.stdout, "99.0"),
        )


def why_impossible() -> str | None:
    """What is missing on this machine, or None."""
    missing = [tool for tool in ("nvmf_tgt", "spdk_nvme_perf") if shutil.which(tool) is None]
    if missing:
        return f"not on the PATH: {', '.join(missing)} (SPDK's applications and examples)"
    if os.geteuid() != 0:
        return "hugepages are reserved by root"
    if len(os.sched_getaffinity(0)) < 2:
        return "two cores are needed: the drive polls one of them"
    return None


@contextmanager
def simulated_drive(nbytes: int, client_nbytes: int) -> Iterator[SimulatedDrive]:
    """A drive of ``nbytes``, and hugepages for perf and for ``client_nbytes`` of the client's."""
    if reason := why_impossible():
        raise RuntimeError(f"no simulated drive: {reason}")
    *_, client_core, drive_core = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="spdk_kv-perf-") as place:
        folder = Path(place)
        settings = folder / "target.json"
        settings.write_text(json.dumps(_target(folder, nbytes)))
        words = ["nvmf_tgt", "--no-pci", "--no-huge", "-s", str(512 + nbytes // MIB)]
        words += ["-m", f"[{drive_core}]", "--disable-cpumask-locks", "-c", str(settings)]
        words += ["-r", str(folder / "rpc.sock")]
        with _hugepages(client_nbytes + 2 * _PERF_MIB * MIB), (folder / "log").open("wb") as log:
            target = subprocess.Popen(words, stdout=log, stderr=log)
            try:
                _wait_for(folder / "cntrl", target, folder / "log")
                yield SimulatedDrive(folder, drive_core, client_core)
            finally:
                target.terminate()
                target.wait(20)


def _target(folder: Path, nbytes: int) -> dict[str, object]:
    """The target's settings."""
    disk = {"name": "Malloc0", "block_size": BLOCK_NBYTES, "num_blocks": nbytes // BLOCK_NBYTES}
    subsystem = {"nqn": NQN, "allow_any_host": True, "serial_number": "SIMULATED"}
    place = {"trtype": "VFIOUSER", "traddr": str(folder), "trsvcid": "0"}
    steps = {
        "bdev": [("bdev_malloc_create", disk)],
        "nvmf": [
            ("nvmf_create_transport", {"trtype": "VFIOUSER"}),
            ("nvmf_create_subsystem", subsystem),
            ("nvmf_subsystem_add_ns", {"nqn": NQN, "namespace": {"bdev_name": "Malloc0"}}),
            ("nvmf_subsystem_add_listener", {"nqn": NQN, "listen_address": place}),
        ],
    }
    return {
        "subsystems": [
            {
                "subsystem": name,
                "config": [{"method": method, "params": given} for method, given in calls],
            }
            for name, calls in steps.items()
        ]
    }


def _wait_for(path: Path, target: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        if target.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"nvmf_tgt did not start: {log.read_text(errors='replace')[-1000:]}")
        time.sleep(0.05)


@contextmanager
def _hugepages(nbytes: int) -> Iterator[None]:
    pool = _HUGEPAGES / "nr_hugepages"
    free, promised = (
        int((_HUGEPAGES / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
    )
    before = int(pool.read_text())
    pool.write_text(str(before + max(0, nbytes // (2 * MIB) - free + promised)))
    # Others may change the pool meanwhile: only what was added here is taken back.
    added = int(pool.read_text()) - before
    try:
        yield
    finally:
        pool.write_text(str(max(0, int(pool.read_text()) - added)))


def _quantile(output: str, percent: str) -> float:
    """In microseconds, from perf's summary (-L)."""
    found = re.search(rf"^\s*{re.escape(percent)}\d*%\s*:\s*([\d.]+)us", output, re.M)
    return float(found[1]) if found else float("nan")
