"""A real NVMe target for the tests: SPDK's nvmf_tgt with bdevs in memory, over vfio-user and TCP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NQN = "nqn.2026-11.io.spdk-kv:test"
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def why_not() -> str | None:
    """Why no target can run here, or None."""
    from spdk_kv.engines import spdk_env

    if missing := spdk_env.why_unavailable():
        return f"spdk_kv was {missing[0]}"
    if shutil.which("nvmf_tgt") is None:
        return "SPDK's nvmf_tgt is not on the PATH"
    if os.geteuid() != 0:
        return "the target needs root (hugepages)"
    return None


@contextlib.contextmanager
def hugepages(nbytes: int) -> Iterator[None]:
    """At least ``nbytes`` of free 2 MiB pages while it lasts; the pool is then as it was."""
    before = int(_HUGEPAGES.read_text())
    free = int((_HUGEPAGES.parent / "free_hugepages").read_text())
    _HUGEPAGES.write_text(str(before + max(0, (nbytes >> 21) - free)))
    try:
        yield
    finally:
        _HUGEPAGES.write_text(str(before))


class Target:
    """A running nvmf_tgt. One subsystem, its namespaces numbered from 1 in the order added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rpc_path = folder / "rpc.sock"
        self._ids = 0
        self.log = (folder / "nvmf_tgt.log").open("wb")
        # The last core, so that the tests' own threads find one that does not spin.
        core = max(os.sched_getaffinity(0))
        command = ["nvmf_tgt", "--no-pci", "--no-huge", "-s", "1024", "--disable-cpumask-locks", "-m", f"[{core}]"]
        self.process = subprocess.Popen(
            [*command, "-r", str(self._rpc_path)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        self._wait_ready()
        self.port = _free_port()
        self.sockets = folder / "vfio-user"
        self.sockets.mkdir()
        self.rpc("nvmf_create_transport", trtype="VFIOUSER")
        self.rpc("nvmf_create_transport", trtype="TCP")
        self.rpc("nvmf_create_subsystem", nqn=NQN, allow_any_host=True, serial_number="SPDKKV01")
        self.namespaces = 0

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                self.rpc("spdk_get_version")
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    tail = (self.folder / "nvmf_tgt.log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"nvmf_tgt did not start:\n{tail}") from None
                time.sleep(0.05)
            else:
                return

    def rpc(self, method: str, **parameters: Any) -> Any:
        """One JSON-RPC call; RuntimeError where the target refuses it."""
        self._ids += 1
        request: dict[str, Any] = {"jsonrpc": "2.0", "id": self._ids, "method": method}
        if parameters:
            request["params"] = parameters
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self._rpc_path))
            connection.sendall(json.dumps(request).encode())
            answer = b""
            while True:
                received = connection.recv(65536)
                if not received:
                    raise ConnectionError("the target closed the connection")
                answer += received
                try:
                    response = json.loads(answer)
                except ValueError:
                    continue
                break
        if "error" in response:
            raise RuntimeError(f"{method}: {response['error']}")
        return response.get("result")

    def add_namespace(self, nbytes: int, block_nbytes: int) -> int:
        """A namespace on a new bdev in memory; returns its number."""
        self.namespaces += 1
        name = f"Malloc{self.namespaces}"
        self.rpc(
            "bdev_malloc_create", name=name, num_blocks=nbytes // block_nbytes,
            block_size=block_nbytes,
        )
        self.rpc("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": name})
        return self.namespaces

    def listen(self) -> None:
        """Opens both ways in; after the namespaces were added."""
        self.rpc(
            "nvmf_subsystem_add_listener", nqn=NQN,
            listen_address={"trtype": "VFIOUSER", "traddr": str(self.sockets), "trsvcid": "0"},
        )
        self.rpc(
            "nvmf_subsystem_add_listener", nqn=NQN,
            listen_address={
                "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": str(self.port),
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

    def close(self) -> None:
        """Ends the target."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
