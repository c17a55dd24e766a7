"""Takes a drive from the kernel and gives it back: everything here may change the machine.

Standard library only. `commands.py` is what the script runs; `docs/binding.md` says what is looked
at first.
"""

from __future__ import annotations

from spdk_kv.binding.commands import Tool
from spdk_kv.binding.report import Report

__all__ = ["Report", "Tool"]
