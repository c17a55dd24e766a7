"""A machine with one spare NVMe drive, as a tree of files, and a kernel that acts on it.

The drive's nodes are sparse files, so that the real wipefs and blkid look into them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from spdk_kv.binding.commands import Tool
from spdk_kv.binding.kernel import WritableKernel
from spdk_kv.binding.report import Report
from spdk_kv.devices.inspection.kernel import Completed, ToolMissing

BDF = "0000:01:00.0"
SERIAL = "S5GX-0042"
MIB = 1 << 20
GROUP = "14"
MOUNT = "36 1 {number} / {point} rw shared:1 - {fstype} {source} rw\n"


class FakeKernel(WritableKernel):
    """Does to the tree what the kernel would do; ``log`` is what was written, in order.

    ``faults``: end of a path -> called before a write to it, and may raise or change the tree.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.log: list[tuple[str, str]] = []
        self.faults: dict[str, Callable[[], None]] = {}
        self.claimed: set[str] = set()  # names whose exclusive open fails
        self.numbers: dict[str, str] = {}  # path below root -> device number
        self.loops: dict[str, str] = {}
        self.missing_tools: set[str] = set()
        self.answers: dict[tuple[str, str], Completed] = {}  # (tool, node's name) -> answer
        self.commands: list[list[str]] = []
        self.root_user = True
        self.new_serial = SERIAL  # what the drive says when nvme takes it again
        self.probe_gives: dict[str, str | None] = {}  # override -> the driver that then binds

    def run(self, command: Sequence[str]) -> Completed:
        self.commands.append(list(command))
        if command[0] in self.missing_tools:
            raise ToolMissing(command[0])
        if command[0] == "modprobe":
            self.machine.driver("vfio-pci")
        if command[0] in ("modprobe", "udevadm"):
            return self.answers.get((command[0], ""), Completed(0, "", ""))
        answer = self.answers.get((command[0], Path(command[-1]).name))
        return answer or super().run(command)

    def has_tool(self, name: str) -> bool:
        return name not in self.missing_tools

    def write(self, path: Path, text: str) -> None:
        shown = str(path.relative_to(self.machine.root))
        for end, fault in list(self.faults.items()):
            if shown.endswith(end):
                fault()
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        os.truncate(path, 0)  # sysfs keeps no rest of a longer value
        super().write(path, text)
        self.log.append((shown, text))
        self._act(shown, text)

    def _act(self, path: str, text: str) -> None:
        machine = self.machine
        if path.endswith("driver_override") and text == "\n":
            machine.write(path, "(null)")
        elif path.endswith("/unbind"):
            name = path.split("/")[-2]
            assert machine.driver_name() == name, f"unbind of {name}, which does not have it"
            machine.unlink_driver()
        elif path.endswith("drivers_probe"):
            override = (machine.root / machine.device / "driver_override").read_text().strip()
            wanted = "nvme" if override == "(null)" else override
            name = self.probe_gives.get(wanted, wanted)
            if name is not None and machine.driver_name() is None:
                machine.link_driver(name, self.new_serial)

    def open_exclusive(self, path: Path) -> int:
        if path.name in self.claimed:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return super().open_exclusive(path)

    def opened_number(self, fd: int) -> str | None:
        return self.device_number(Path(os.readlink(f"/proc/self/fd/{fd}")))

    def device_number(self, path: Path) -> str | None:
        shown = str(path.relative_to(self.machine.root))
        if shown in self.numbers:
            return self.numbers[shown]
        if "/map_files/" in shown:
            raise FileNotFoundError(shown)
        if shown.startswith("proc/"):
            return None
        os.stat(path)
        dev = self.machine.root / "sys/class/block" / path.name / "dev"
        return f"b{dev.read_text().strip()}" if dev.exists() else None

    def loop_backing_number(self, node: Path) -> str | None:
        return self.loops.get(node.name)

    def group_id(self, name: str) -> int:
        return {"kv": os.getgid()}[name]

    def is_root(self) -> bool:
        return self.root_user


class Machine:
    """One drive at BDF, free, with an IOMMU group of its own; tests then spoil it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kernel = FakeKernel(self)
        self.device = f"sys/devices/pci0000:00/{BDF}"
        self.controller = f"{self.device}/nvme/nvme0"
        self.minor = 0
        self.write("proc/sys/kernel/osrelease", "6.1.0")
        self.write("proc/sys/kernel/random/boot_id", "boot-one")
        self.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority")
        self.write("proc/meminfo", "MemAvailable: 8388608 kB\nHugepagesize:    2048 kB")
        self.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "10")
        for kind, number in (("pid", 4026531836), ("user", 4026531837), ("mnt", 99)):
            for process in ("self", "1"):
                self.symlink(f"proc/{process}/ns/{kind}", f"{kind}:[{number}]")
        self.process("1", "init")
        self.write("sys/bus/pci/drivers_probe", "")
        self.driver("nvme")
        self.driver("vfio-pci")
        (root / "dev/vfio").mkdir(parents=True)
        (root / "run").mkdir()
        self.write(f"{self.device}/class", "0x010802")
        self.write(f"{self.device}/driver_override", "(null)")
        self.link(f"sys/bus/pci/devices/{BDF}", self.device)
        self.link(f"{self.device}/iommu_group", f"sys/kernel/iommu_groups/{GROUP}")
        self.link(f"sys/kernel/iommu_groups/{GROUP}/devices/{BDF}", self.device)
        self.link_driver("nvme", SERIAL)

    def tool(self) -> Tool:
        return Tool(self.root, ["/usr/bin/python3", "/opt/spdk_kv/setup_vfio.py"], self.kernel)

    def bind(self, **options: object) -> Report:
        return self.tool().bind(BDF, SERIAL, **{"yes": True, **options})  # type: ignore[arg-type]

    # Files.

    def write(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")

    def symlink(self, path: str, target: str) -> None:
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)

    def link(self, path: str, target: str) -> None:
        (self.root / target).mkdir(parents=True, exist_ok=True)
        if not (self.root / path).is_symlink():
            self.symlink(path, "../" * (len(Path(path).parts) - 1) + target)

    # Devices.

    def disk(self, path: str, nbytes: int = 8 * MIB) -> str:
        """A block device at ``path``, with a node; returns its major:minor."""
        self.minor += 1
        name = Path(path).name
        self.write(f"{path}/dev", f"259:{self.minor}")
        self.write(f"{path}/size", str(nbytes // 512))
        self.write(f"{path}/inflight", "       0        0")
        self.write(f"{path}/stat", " ".join(["7"] * 17))
        self.link(f"sys/class/block/{name}", path)
        node = self.root / "dev" / name
        if not node.exists():  # the medium outlives a driver
            node.touch()
            os.truncate(node, nbytes)
        return f"259:{self.minor}"

    def namespace(self, number: int = 1) -> str:
        path = f"{self.controller}/nvme0n{number}"
        self.disk(path)
        generic = f"{self.controller}/ng0n{number}"
        self.write(f"{generic}/dev", f"240:{number}")
        self.link(f"sys/class/nvme-generic/ng0n{number}", generic)
        return path

    def partition(self, number: int = 1) -> str:
        path = f"{self.controller}/nvme0n1/nvme0n1p{number}"
        self.write(f"{path}/partition", str(number))
        return self.disk(path, 4 * MIB)

    def holder(self, name: str, below: str) -> str:
        """A virtual device ``name`` on the device at ``below``; returns its major:minor."""
        path = f"sys/devices/virtual/block/{name}"
        number = self.disk(path)
        self.link(f"{below}/holders/{name}", path)
        return number

    def driver(self, name: str) -> None:
        self.write(f"sys/bus/pci/drivers/{name}/unbind", "")

    def driver_name(self) -> str | None:
        link = self.root / self.device / "driver"
        return link.readlink().name if link.is_symlink() else None

    def unlink_driver(self) -> None:
        (self.root / self.device / "driver").unlink()
        for name in list((self.root / "sys/class/block").iterdir()):
            if f"/{BDF}/" in str(name.readlink()):
                name.unlink()
        (self.root / "sys/class/nvme-subsystem/nvme-subsys0/nvme0").unlink(missing_ok=True)
        nvme = self.root / self.device / "nvme"
        if nvme.exists():
            nvme.rename(self.root / f"sys/gone-{self.minor}")
        (self.root / "dev/vfio" / GROUP).unlink(missing_ok=True)

    def link_driver(self, name: str, serial: str) -> None:
        self.link(f"{self.device}/driver", f"sys/bus/pci/drivers/{name}")
        if name == "vfio-pci":
            self.write(f"dev/vfio/{GROUP}", "")
        if name == "nvme":
            self.write(f"{self.controller}/serial", serial.ljust(20))
            self.write(f"{self.controller}/model", "ACME Fast".ljust(40))
            self.write(f"{self.controller}/state", "live")
            self.write(f"{self.controller}/dev", "241:0")
            self.link("sys/class/nvme/nvme0", self.controller)
            self.link("sys/class/nvme-subsystem/nvme-subsys0/nvme0", self.controller)
            self.namespace()

    # Processes.

    def process(self, pid: str, name: str, *, thread: str | None = None) -> str:
        """A process, or another thread of one; returns the thread's folder."""
        task = f"proc/{pid}/task/{thread or pid}"
        self.write(f"proc/{pid}/comm", name)
        self.write(f"{task}/maps", "00400000-00401000 r--p 00000000 08:01 5      /bin/true")
        self.write(f"{task}/status", "State:\tS (sleeping)")
        self.write(f"{task}/mountinfo", MOUNT.format(
            number="8:1", point="/", fstype="ext4", source="/dev/sda1").strip())  # fmt: skip
        (self.root / task / "fd").mkdir(exist_ok=True)
        return task

    def mount(self, task: str, number: str, point: str, source: str, fstype: str = "ext4") -> None:
        with (self.root / task / "mountinfo").open("a") as file:
            file.write(MOUNT.format(number=number, point=point, fstype=fstype, source=source))

    # What came of it.

    def media(self) -> dict[str, str]:
        """Each node below /dev -> the hash of its content."""
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (self.root / "dev").iterdir()
            if file.is_file()
        }

    def record(self) -> dict[str, object] | None:
        path = self.root / f"run/spdk_kv/bound-{BDF}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def override(self) -> str:
        return (self.root / self.device / "driver_override").read_text().strip()

    def as_before(self) -> None:
        """Asserts that the drive is the kernel's as it was, and that nothing is on record."""
        assert self.driver_name() == "nvme"
        assert self.override() == "(null)"
        assert self.record() is None


def codes(report: Report) -> set[str]:
    return {reason["code"] for reason in report.fields.get("reasons", [])}
