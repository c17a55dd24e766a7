"""What this machine has: NVMe drives, and the host around them. Looks only; changes nothing.

Standard library only. `inspection/` takes one drive and says who uses it, what is on it, and
whether it may be taken from the kernel. Every reader takes ``root``, the directory that stands for
``/``, and returns None or an empty tuple for what the kernel does not show. `binding/` is the room
that changes the machine.
"""

from __future__ import annotations

from spdk_kv.devices.health import Health, read_health
from spdk_kv.devices.host import Host, read_host, read_meminfo
from spdk_kv.devices.io_uring import IoUringStatus
from spdk_kv.devices.mounts import Mount, parse_mounts, read_mounts
from spdk_kv.devices.nvme import NvmeDrive, list_drives
from spdk_kv.devices.sysfs import exists, parse_count, read_count, read_text

__all__ = [
    "Health",
    "Host",
    "IoUringStatus",
    "Mount",
    "NvmeDrive",
    "exists",
    "list_drives",
    "parse_count",
    "parse_mounts",
    "read_count",
    "read_health",
    "read_host",
    "read_meminfo",
    "read_mounts",
    "read_text",
]
