"""Everything that changes the machine: no other room writes to /sys or /proc.

Most of it takes NVMe drives from the kernel and gives them back: `commands.py` is what
scripts/setup_vfio.py and `spdk-kv device` run; docs/reference/binding.md says what is checked.
Measurements change the machine as well: `memory_limit.py` makes a cgroup with a limit, and
`clean_start.py` empties the page cache. Standard library only. `devices/` is the room that looks.
"""

from __future__ import annotations

from spdk_kv.binding.clean_start import drop_page_cache, reset_peak_rss
from spdk_kv.binding.commands import Tool
from spdk_kv.binding.memory_limit import MemoryGroup, memory_group, why_impossible
from spdk_kv.binding.report import Report

__all__ = [
    "MemoryGroup",
    "Report",
    "Tool",
    "drop_page_cache",
    "memory_group",
    "reset_peak_rss",
    "why_impossible",
]
