"""The lab: a PC in QEMU with NVMe drives and an IOMMU, booted once per session and variant.

Only on request (scripts/test.sh --lab): a boot takes between 5 and 30 seconds. Each test uses
drives of its own, by serial, so that one that is lost takes no other test with it. What runs
inside is tests/lab/guest_*.py, by this Python, and prints its answer as JSON on its last line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spdk_kv

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "vagrant"))

from labkit.guestlink import Command  # noqa: E402
from labkit.hardware import MIB, Drive, Hardware  # noqa: E402
from labkit.machine import Machine  # noqa: E402
from labkit.needs import LabUnavailable, find_host  # noqa: E402

# Of the drive LAB-BAD: 512-byte blocks that cannot be read, past the first MiB.
BAD_BLOCKS = (4096, 4097)


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
        """The command line of tests/lab/guest_``name``.py."""
        return [sys.executable, str(HERE / f"guest_{name}.py"), *map(str, arguments)]

    def start(self, name: str, *arguments: object, **options: Any) -> Command:
        """Starts tests/lab/guest_``name``.py inside."""
        return self.machine.link.start(self.command(name, *arguments), env=self.env, **options)

    def answer(self, command: Command, timeout_s: float = 120.0) -> Any:
        """Waits for a script; what it told. Fails with its output if it failed or hung."""
        status = self.machine.link.wait(command, timeout_s)
        said = command.text()
        assert not command.timed_out, f"did not end within {timeout_s} s:\n{said}"
        assert status == 0, f"exit status {status}:\n{said}\n{self.machine.console()[-2000:]}"
        return json.loads(command.text("out").splitlines()[-1])

    def script(
        self, name: str, *arguments: object, timeout_s: float = 120.0, **options: Any
    ) -> Any:
        """Runs a script inside and returns what it told."""
        return self.answer(self.start(name, *arguments, **options), timeout_s)

    def shell(self, command: str, *, timeout_s: float = 60.0, check: bool = True) -> Command:
        """Runs a line of shell inside, as root."""
        done = self.machine.run("sh", "-c", command, timeout_s=timeout_s)
        assert done.status == 0 or not check, f"{command}: status {done.status}\n{done.text()}"
        return done


def boot(hardware: Hardware) -> Iterator[Lab]:
    with Machine(hardware) as machine:
        yield Lab(machine)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The machine with an IOMMU."""
    drives = [
        Drive("n0", "LAB-N0"),
        Drive("n1", "LAB-N1", block_nbytes=4096),
        Drive("bad", "LAB-BAD", bad_blocks=BAD_BLOCKS),
        Drive("power", "LAB-POWER", nbytes=49 * MIB, write_log="power.log",
              parts=(24 * MIB, 24 * MIB, MIB)),
        Drive("meta", "LAB-META", nbytes=64 * MIB, metadata_nbytes=8),
        *(
            Drive(name, f"LAB-{name.upper()}")
            for name in ("pull", "cut", "kill", "user", "lock", "nggo")
        ),
        Drive("bind", "LAB-BIND", nbytes=64 * MIB),
        Drive("two0", "LAB-TWO0", nbytes=64 * MIB),
        Drive("two1", "LAB-TWO1", nbytes=64 * MIB, shares_group_with="two0"),
    ]  # fmt: skip
    yield from boot(Hardware(drives))


@pytest.fixture(scope="session")
def lab_without_iommu() -> Iterator[Lab]:
    """The machine without one."""
    yield from boot(
        Hardware([Drive("n0", "LAB-N0", nbytes=64 * MIB)], iommu=False, hugepage_nbytes=0)
    )
