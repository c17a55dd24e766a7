"""The command line: one small module per command, loaded when it is called."""

from __future__ import annotations

from spdk_kv.cli.main import main

__all__ = ["main"]
