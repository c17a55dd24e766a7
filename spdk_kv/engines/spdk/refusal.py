"""Why SPDK found no controller at a PCI address: it does not say itself, sysfs and limits do."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from spdk_kv.errors import DeviceGone, EngineUnavailable, SpdkKvError

_DEVICES = Path("/sys/bus/pci/devices")


def refusal(address: str, pinned_nbytes: int) -> SpdkKvError:
    """The error for a drive at ``address`` that could not be connected to.

    ``pinned_nbytes``: the memory that the drive was to reach.
    """
    function = _DEVICES / address
    if not function.exists():
        return DeviceGone(f"there is no PCI device {address}")
    driver = _name_behind(function / "driver")
    if driver != "vfio-pci":
        has = f"the driver {driver}" if driver else "no driver"
        return EngineUnavailable(
            f"{address} has {has}, not vfio-pci; `scripts/setup_vfio.py status` shows whether it "
            "may be taken, `bind` takes it"
        )
    node = f"/dev/vfio/{_name_behind(function / 'iommu_group')}"
    if not os.access(node, os.R_OK | os.W_OK):
        return EngineUnavailable(
            f"this user may not open {node}, the VFIO group of {address}: "
            f"scripts/setup_vfio.py permissions --group GROUP {address}"
        )
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.geteuid() != 0 and 0 <= limit < pinned_nbytes:
        return EngineUnavailable(
            f"RLIMIT_MEMLOCK is {limit >> 10} KiB, and {address} is to reach "
            f"{pinned_nbytes >> 10} KiB of memory, all of it pinned: raise memlock in "
            "/etc/security/limits.conf (or LimitMEMLOCK= of the service) and log in again"
        )
    return DeviceGone(
        f"the controller at {address} does not answer; perhaps another process drives it. The log "
        "of spdk_kv.spdk and `spdk-kv doctor` may say more"
    )


def _name_behind(link: Path) -> str:
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""
