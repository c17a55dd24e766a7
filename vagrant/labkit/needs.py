"""What the lab needs of this host, and what Debian's packages call it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What the guest loads before it has its root; the rest comes from the root itself.
EARLY_MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console")


class LabUnavailable(Exception):
    """The lab cannot run on this host; the message says what is missing and what mends it."""


@dataclass(frozen=True)
class Host:
    """What was found: the emulator, a kernel with its modules, a static busybox."""

    qemu: str
    kernel: Path
    release: str
    busybox: str


def _newest_kernel() -> tuple[Path, str] | None:
    """The newest kernel here with all modules; cloud kernels, for one, come without NVMe."""
    images = sorted(Path("/boot").glob("vmlinuz-*"), key=lambda image: image.stat().st_mtime)
    for image in reversed(images):
        release = image.name.removeprefix("vmlinuz-")
        if (Path("/lib/modules") / release / "modules.dep").exists() and all(
            module_files(release, name) is not None for name in (*EARLY_MODULES, "nvme", "vfio-pci")
        ):
            return image, release
    return None


def module_files(release: str, name: str) -> list[str] | None:
    """The files of a module and of what it stands on, in the order to load them; or None."""
    command = ["modprobe", "--set-version", release, "--show-depends", name]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if shown.returncode:
        return None
    lines = [line.split() for line in shown.stdout.splitlines()]
    # A `builtin` line has no file to load.
    return [words[1] for words in lines if words[:1] == ["insmod"]]


def _add_sbin() -> None:
    """Ordinary users often lack the folder that modprobe lies in."""
    folders = os.environ.get("PATH", "").split(":")
    os.environ["PATH"] = ":".join([*folders, *({"/usr/sbin", "/sbin"} - set(folders))])


def missing_packages() -> list[str]:
    """Debian's packages that the lab lacks here."""
    _add_sbin()
    wanted = {
        "qemu-system-x86": shutil.which("qemu-system-x86_64"),
        "busybox-static": static_busybox(),
        "kmod": shutil.which("modprobe"),
        "linux-image-amd64": _newest_kernel() if shutil.which("modprobe") else None,
    }
    return [name for name, found in wanted.items() if not found]


# Package -> a program in it with which tests prepare drives; they skip what they can't prepare.
TEST_TOOLS = {
    "dmsetup": "dmsetup",
    "fdisk": "sfdisk",
    "lvm2": "lvcreate",
    "mdadm": "mdadm",
    "udev": "udevadm",
}


def missing_for_tests() -> list[str]:
    """Debian's packages without which some of the lab's tests are skipped here."""
    _add_sbin()
    return [name for name, program in TEST_TOOLS.items() if not shutil.which(program)]


def static_busybox() -> str | None:
    """A busybox that needs no libraries: there are none in the first file system."""
    path = shutil.which("busybox")
    # A dynamically linked program names its loader near its start.
    if path is None or b"ld-linux" in Path(path).read_bytes()[:4096]:
        return None
    return path


def install_command(packages: list[str]) -> list[str]:
    """The command that installs ``packages`` on Debian and Ubuntu."""
    return ["apt-get", "install", "-y", "--no-install-recommends", *packages]


def find_host() -> Host:
    """What the lab runs with. LabUnavailable where something is missing."""
    missing = missing_packages()
    if missing:
        raise LabUnavailable(
            f"the lab needs {', '.join(missing)} (Debian, Ubuntu: "
            f"{' '.join(install_command(missing))})"
        )
    qemu, busybox, newest = shutil.which("qemu-system-x86_64"), static_busybox(), _newest_kernel()
    if qemu is None or busybox is None or newest is None:
        raise LabUnavailable("a package went away while the lab started")
    if not os.access(newest[0], os.R_OK):
        raise LabUnavailable(f"{newest[0]} may only be read by root: run the lab as root")
    return Host(qemu, *newest, busybox)
