"""One drive under inspection: who uses it, what is on it, and whether it may be taken.

`facts.py` collects, `verdict.py` judges and `reasons.py` has the codes. Nothing is written. The one
thing that others can notice is an exclusive claim (`claims.py`): a read-only open that keeps them
from mounting the drive while it is held.
"""

from __future__ import annotations

from spdk_kv.devices.inspection.claims import claim
from spdk_kv.devices.inspection.facts import (
    BDF,
    Facts,
    function_path,
    read_driver,
    read_facts,
    read_override,
    read_serial,
)
from spdk_kv.devices.inspection.kernel import Kernel, ToolMissing
from spdk_kv.devices.inspection.processes import check_nodes_open
from spdk_kv.devices.inspection.reasons import (
    CONTENT_CODES,
    USE_CODES,
    Code,
    Reason,
    Refused,
    refuse,
)
from spdk_kv.devices.inspection.sightings import Sightings
from spdk_kv.devices.inspection.stack import read_namespace
from spdk_kv.devices.inspection.strict import (
    Unreadable,
    listing,
    optional_link_name,
    required_count,
)
from spdk_kv.devices.inspection.usage import check_kernel_use
from spdk_kv.devices.inspection.verdict import changes, reasons_against, without_contents

__all__ = [
    "BDF",
    "CONTENT_CODES",
    "USE_CODES",
    "Code",
    "Facts",
    "Kernel",
    "Reason",
    "Refused",
    "Sightings",
    "ToolMissing",
    "Unreadable",
    "changes",
    "check_kernel_use",
    "check_nodes_open",
    "claim",
    "function_path",
    "listing",
    "optional_link_name",
    "read_driver",
    "read_facts",
    "read_namespace",
    "read_override",
    "read_serial",
    "reasons_against",
    "refuse",
    "required_count",
    "without_contents",
]
