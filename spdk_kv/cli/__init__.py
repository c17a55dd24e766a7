"""The command line: one module or folder per command, loaded when it is called."""

from __future__ import annotations

from spdk_kv.cli.main import main

__all__ = ["main"]
