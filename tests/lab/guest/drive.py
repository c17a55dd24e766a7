"""Inside the lab: one drive, found by its serial, taken from the kernel and given back by hand.

By hand, through sysfs alone: what scripts/setup_vfio.py does must not be its own proof.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
CONTROLLERS = Path("/sys/class/nvme")


def wait_for(what: Callable[[], object], timeout_s: float = 300.0) -> object:
    """The first true answer of ``what``. TimeoutError."""
    until = time.monotonic() + timeout_s
    while not (found := what()):
        if time.monotonic() > until:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.05)
    return found


def controller_of(serial: str) -> Path | None:
    """The kernel's controller with this serial, when it has one."""
    for controller in CONTROLLERS.glob("nvme*"):
        try:
            if (controller / "serial").read_text().strip() == serial:
                return controller
        except OSError:
            pass  # it is just coming or going
    return None


def address_of(serial: str) -> str:
    """The PCI address of the drive, which the kernel has to drive now."""
    controller = wait_for(lambda: controller_of(serial))
    return os.path.basename(os.path.realpath(f"{controller}/device"))


def node_of(serial: str) -> str:
    """The drive's block device; waits until it can be opened."""

    def ready() -> str | None:
        controller = controller_of(serial)
        for disk in controller.glob("nvme*n1") if controller else ():
            if Path("/dev", disk.name).exists() and int((disk / "size").read_text()):
                return f"/dev/{disk.name}"
        return None

    return str(wait_for(ready))


def group_of(address: str) -> str:
    """The number of the function's IOMMU group."""
    return os.path.basename(os.readlink(DEVICES / address / "iommu_group"))


def driver_of(address: str) -> str:
    """The driver's name, or nothing."""
    link = DEVICES / address / "driver"
    return os.path.basename(os.readlink(link)) if link.exists() else ""


def bind(address: str, driver: str, override: str) -> None:
    """Hands the function to ``driver``; ``override``: what may bind it from now on ("": any)."""
    function = DEVICES / address
    if driver_of(address):
        (function / "driver" / "unbind").write_text(address)
    # Writing nothing would fail with EINVAL; a newline empties it.
    (function / "driver_override").write_text(f"{override}\n")
    Path("/sys/bus/pci/drivers_probe").write_text(address)
    wait_for(lambda: driver_of(address) == driver)


def take(serial: str) -> str:
    """Binds the drive to vfio-pci; returns its PCI address."""
    address = address_of(serial)
    bind(address, "vfio-pci", "vfio-pci")
    return address


def give_back(address: str) -> None:
    """Binds the drive to the kernel's driver again."""
    bind(address, "nvme", "")
