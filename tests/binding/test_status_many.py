"""`status` looks at the processes once for all drives; `bind` looks again at every step."""

from __future__ import annotations

from pathlib import Path

import pytest

from binding.machine import BDF, SERIAL, FakeKernel, Machine, codes

OTHERS = [f"0000:0{number}:00.0" for number in range(2, 5)]
OPENED = "proc/77/task/77/fd/3"


class CountingKernel(FakeKernel):
    looks = 0

    def device_number(self, path: Path) -> str | None:
        self.looks += str(path).endswith(OPENED)
        return super().device_number(path)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Four drives, and a process that has the last one open."""
    machine = Machine(tmp_path)
    machine.kernel = CountingKernel(machine)
    for number, bdf in enumerate(OTHERS, 1):
        device = f"sys/devices/pci0000:00/{bdf}"
        controller = f"{device}/nvme/nvme{number}"
        machine.write(f"{device}/class", "0x010802")
        machine.write(f"{device}/driver_override", "(null)")
        machine.link(f"{device}/driver", "sys/bus/pci/drivers/nvme")
        machine.link(f"{device}/iommu_group", f"sys/kernel/iommu_groups/2{number}")
        machine.link(f"sys/kernel/iommu_groups/2{number}/devices/{bdf}", device)
        machine.link(f"sys/bus/pci/devices/{bdf}", device)
        for name, text in {"serial": bdf, "model": "ACME", "state": "live", "dev": "0:0"}.items():
            machine.write(f"{controller}/{name}", text)
        machine.link(f"sys/class/nvme/nvme{number}", controller)
        machine.link(f"sys/class/nvme-subsystem/nvme-subsys{number}/nvme{number}", controller)
        machine.disk(f"{controller}/nvme{number}n1")
    machine.process("77", "reader")
    machine.symlink(OPENED, "/dev/nvme3n1")
    return machine


def test_status_judges_all_drives_by_one_look(machine: Machine) -> None:
    drives = machine.tool().status().fields["drives"]
    states = {drive["bdf"]: drive["state"] for drive in drives}
    assert states == dict.fromkeys([BDF, *OTHERS[:-1]], "free") | {OTHERS[-1]: "in-use"}
    assert [reason["found"] for reason in drives[-1]["reasons"]] == [
        "nvme3n1 by process 77 (reader)"
    ]
    assert machine.kernel.looks == 1


def test_every_status_looks_again(machine: Machine) -> None:
    tool = machine.tool()
    assert tool.status().fields["drives"][-1]["state"] == "in-use"
    (machine.root / OPENED).unlink()
    assert tool.status().fields["drives"][-1]["state"] == "free"


def test_bind_looks_again_right_before_it_acts(machine: Machine) -> None:
    tool = machine.tool()
    assert tool.status().fields["drives"][0]["state"] == "free"

    def opens() -> None:
        machine.kernel.faults.clear()
        machine.symlink("proc/77/task/77/fd/4", "/dev/nvme0n1")

    machine.kernel.faults["driver_override"] = opens
    report = tool.bind(BDF, SERIAL, yes=True)
    assert (report.status, codes(report)) == (2, {"open"})
    assert machine.kernel.looks == 3  # status, and both looks of bind
    machine.as_before()
