"""Why SPDK found no controller: it does not say itself; sysfs, limits, files and a look at the
target do."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
from pathlib import Path

from spdk_kv.engines.location import Location
from spdk_kv.errors import DeviceGone, DeviceTimeout, EngineUnavailable, SpdkKvError

_DEVICES = Path("/sys/bus/pci/devices")
# How long a look at a TCP target may take.
_LOOK_S = 1.0
# NVMe/TCP's first message and its answer (NVMe TCP Transport 1.0, 3.6.2.2).
_HELLO = struct.pack("<BBBBIHBBI", 0, 0, 128, 0, 128, 0, 0, 0, 0).ljust(128, b"\0")
_HELLO_BACK = 1
_DOCTOR = "; see `spdk-kv doctor`"


def refusal(location: Location, refused: OSError, pinned_nbytes: int) -> SpdkKvError:
    """The error for a controller that could not be connected to. Blocks for 2 s at most.

    ``pinned_nbytes``: the memory that a PCIe drive was to reach.
    """
    if location.scheme == "spdk":
        return _of_drive(location.path, pinned_nbytes)
    if location.scheme == "spdk+vfiouser":
        return _of_socket(location, refused.errno or 0)
    return _of_portal(location, refused)


def _of_socket(location: Location, status: int) -> SpdkKvError:
    folder, at = location.path, f"{location.path}/cntrl"
    if status in (errno.EACCES, errno.EPERM):
        return EngineUnavailable(
            f"this user may not connect to the target's socket {at}: give it read and write access "
            "to the socket and search access to the folders above"
        )
    if status == errno.ENOENT:
        what = f"socket {at}" if os.path.isdir(folder) else f"folder {folder}"
        return DeviceGone(f"there is no {what}: no vfio-user target listens there{_DOCTOR}")
    if status in (errno.ECONNREFUSED, errno.ECONNRESET):
        return DeviceGone(f"no process listens at {at} any more: the target ended{_DOCTOR}")
    if status == errno.ETIMEDOUT:
        return DeviceTimeout(
            f"the vfio-user target at {folder} does not answer: it serves one process at a time, "
            f"and another one has it, or it hangs{_DOCTOR}",
            op="open",
            status=status,
        )
    return DeviceGone(
        f"the vfio-user target at {folder} answers, but provides no controller {location.nqn}; the "
        f"log of spdk_kv.spdk says why{_DOCTOR}"
    )


def _of_portal(location: Location, refused: OSError) -> SpdkKvError:
    at = f"{location.host} port {location.port}"
    try:
        with socket.create_connection((location.host, int(location.port)), _LOOK_S) as portal:
            portal.sendall(_HELLO)
            answer = portal.recv(128)
    except socket.gaierror as unknown:
        return DeviceGone(f"{location.host} is not known ({unknown.strerror}){_DOCTOR}")
    except ConnectionRefusedError:
        return DeviceGone(f"no NVMe/TCP target listens at {at}{_DOCTOR}")
    except TimeoutError:
        return DeviceTimeout(
            f"the NVMe/TCP target at {at} does not answer{_DOCTOR}",
            op="open",
            status=errno.ETIMEDOUT,
        )
    except OSError as failed:
        return DeviceGone(f"{at} is not reached: {failed.strerror or failed}{_DOCTOR}")
    if not answer or answer[0] != _HELLO_BACK:
        return DeviceGone(f"what listens at {at} is no NVMe/TCP target{_DOCTOR}")
    if refused.errno == errno.ETIMEDOUT:
        return DeviceTimeout(
            f"the NVMe/TCP target at {at} did not provide a controller in time{_DOCTOR}",
            op="open",
            status=errno.ETIMEDOUT,
        )
    return DeviceGone(
        f"the NVMe/TCP target at {at} answers, but has no subsystem {location.nqn} for this host; "
        f"the log of spdk_kv.spdk says more{_DOCTOR}"
    )


def _of_drive(address: str, pinned_nbytes: int) -> SpdkKvError:
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
