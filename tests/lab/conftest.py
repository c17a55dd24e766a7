"""The lab: a PC in QEMU with NVMe drives and an IOMMU, booted once per session and variant.

Only on request (scripts/test.sh --lab): a boot takes between 5 and 30 seconds. Each test uses
drives of its own, by serial, so that one that is lost takes no other test with it. What runs
inside is tests/lab/guest/*.py, by this Python, and prints its answer as JSON on its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spdk_kv

# As vagrant/guest_agent.py sets it.
GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "vagrant"))

from labkit.guestlink import Command  # noqa: E402
from labkit.hardware import MIB, Drive, Hardware  # noqa: E402
from labkit.machine import Machine  # noqa: E402
from labkit.needs import LabUnavailable, find_host  # noqa: E402

# Nothing in there takes long by itself, but emulated on a busy host everything may: whatever is
# waited for is waited for this long, and what a test finds out is never how fast it was.
PATIENCE_S = 600.0
# Of the drive LAB-BAD: 512-byte blocks that cannot be read, past the first MiB.
BAD_BLOCKS = (4096, 4097)
# A free drive of this size is looked at in large pieces; of more, in thousands of small ones.
SMALL = 40 * MIB


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All in this folder is `lab`, and skipped with the reason unless it can and shall run."""
    ours = [item for item in items if HERE in item.path.parents]
    reason = ""
    if ours and os.environ.get("SPDK_KV_LAB") != "1":
        reason = "the lab boots virtual machines: scripts/test.sh --lab runs it"
    elif ours:
        try:
            find_host()
        except LabUnavailable as unavailable:
            reason = str(unavailable)
    for item in ours:
        item.add_marker(pytest.mark.lab)
        item.add_marker(pytest.mark.timeout(4 * PATIENCE_S))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


class Lab:
    """A booted machine and the scripts to run in it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @property
    def env(self) -> dict[str, str]:
        """Where this very spdk_kv comes from, installed or not."""
        return {"PYTHONPATH": str(Path(spdk_kv.__file__).parent.parent)}

    def command(self, name: str, *arguments: object) -> list[str]:
        """The command line of tests/lab/guest/``name``.py."""
        return [sys.executable, str(HERE / "guest" / f"{name}.py"), *map(str, arguments)]

    def start(self, name: str, *arguments: object, **options: Any) -> Command:
        """Starts tests/lab/guest/``name``.py inside."""
        return self.machine.link.start(self.command(name, *arguments), env=self.env, **options)

    def answer(self, command: Command) -> Any:
        """Waits for a script; what it told. Fails with its output if it failed or hung."""
        status = self.machine.link.wait(command, PATIENCE_S)
        said = command.text()
        assert not command.timed_out, f"did not end within {PATIENCE_S} s:\n{said}"
        assert status == 0, f"exit status {status}:\n{said}\n{self.machine.console()[-2000:]}"
        return json.loads(command.text("out").splitlines()[-1])

    def script(self, name: str, *arguments: object, **options: Any) -> Any:
        """Runs a script inside and returns what it told."""
        return self.answer(self.start(name, *arguments, **options))

    def await_text(self, command: Command, text: str) -> None:
        """Until a script has printed ``text``."""
        self.machine.link.wait_text(command, text, PATIENCE_S)

    def shell(self, command: str, *, check: bool = True) -> Command:
        """Runs a line of shell inside, as root."""
        done = self.machine.run("sh", "-c", command, timeout_s=PATIENCE_S)
        assert done.status == 0 or not check, f"{command}: status {done.status}\n{done.text()}"
        return done

    def give_back(self, address: str) -> None:
        """Hands a drive to the kernel's driver again, by hand: past any tool."""
        function = f"/sys/bus/pci/devices/{address}"
        self.shell(
            f"echo {address} >{function}/driver/unbind && echo >{function}/driver_override && "
            f"echo {address} >/sys/bus/pci/drivers_probe"
        )


def boot(hardware: Hardware) -> Iterator[Lab]:
    # Half of an emulated run of the binding script, which leaves no bytecode, was compiling it.
    compiling = ["python3", "-m", "compileall", "-q", str(ROOT / "spdk_kv")]
    subprocess.run(compiling, env={"PATH": GUEST_PATH}, stdout=subprocess.DEVNULL, check=False)
    with Machine(hardware) as machine:
        yield Lab(machine)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The machine with an IOMMU."""
    drives = [
        Drive("n0", "LAB-N0", nbytes=SMALL),
        Drive("n1", "LAB-N1", nbytes=SMALL, block_nbytes=4096),
        Drive("bad", "LAB-BAD", nbytes=SMALL, bad_blocks=BAD_BLOCKS),
        Drive("power", "LAB-POWER", nbytes=49 * MIB, write_log="power.log",
              parts=(24 * MIB, 24 * MIB, MIB)),
        Drive("meta", "LAB-META", nbytes=SMALL, metadata_nbytes=8),
        *(
            Drive(name, f"LAB-{name.upper()}", nbytes=SMALL)
            for name in ("pull", "cut", "kill", "user", "lock", "nggo", "bind", "two0")
        ),
        Drive("two1", "LAB-TWO1", nbytes=SMALL, shares_group_with="two0"),
    ]  # fmt: skip
    yield from boot(Hardware(drives))


@pytest.fixture(scope="session")
def lab_without_iommu() -> Iterator[Lab]:
    """The machine without one."""
    yield from boot(Hardware([Drive("n0", "LAB-N0", nbytes=SMALL)], iommu=False, hugepage_nbytes=0))
