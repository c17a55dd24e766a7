"""What this machine has: NVMe drives, who uses them, and the host around them.

Standard library only, and read-only: nothing here changes a drive or a setting. Every reader
takes ``root``, the directory that stands for ``/``, and answers None or an empty tuple for what
the kernel does not tell.
"""

from __future__ import annotations

from spdk_kv.devices.checks import changes, verdict, without_contents
from spdk_kv.devices.claims import claim
from spdk_kv.devices.facts import (
    BDF,
    Facts,
    function_path,
    read_driver,
    read_facts,
    read_override,
    read_serial,
)
from spdk_kv.devices.host import Host, read_host, read_meminfo
from spdk_kv.devices.io_uring import IoUringStatus
from spdk_kv.devices.kernel import Kernel, ToolMissing
from spdk_kv.devices.mounts import Mount, parse_mounts, read_mounts
from spdk_kv.devices.nvme import NvmeDrive, list_drives
from spdk_kv.devices.processes import check_nodes_open
from spdk_kv.devices.reasons import (
    CONTENT_CODES,
    USE_CODES,
    Code,
    Reason,
    Refused,
    StepFailed,
    refuse,
)
from spdk_kv.devices.sightings import Sightings
from spdk_kv.devices.stack import read_namespace
from spdk_kv.devices.strict import Unreadable, listing, optional_link_name, required_count
from spdk_kv.devices.sysfs import exists, parse_count, read_count, read_text
from spdk_kv.devices.usage import check_kernel_use

__all__ = [
    "BDF",
    "CONTENT_CODES",
    "USE_CODES",
    "Code",
    "Facts",
    "Host",
    "IoUringStatus",
    "Kernel",
    "Mount",
    "NvmeDrive",
    "Reason",
    "Refused",
    "Sightings",
    "StepFailed",
    "ToolMissing",
    "Unreadable",
    "changes",
    "check_kernel_use",
    "check_nodes_open",
    "claim",
    "exists",
    "function_path",
    "list_drives",
    "listing",
    "optional_link_name",
    "parse_count",
    "parse_mounts",
    "read_count",
    "read_driver",
    "read_facts",
    "read_host",
    "read_meminfo",
    "read_mounts",
    "read_namespace",
    "read_override",
    "read_serial",
    "read_text",
    "refuse",
    "required_count",
    "verdict",
    "without_contents",
]
