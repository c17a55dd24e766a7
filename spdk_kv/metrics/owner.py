"""Which process has a store open, such that another one with its number is not taken for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def own_identity() -> dict[str, int]:
    """``pid``, ``started`` (clock ticks after the boot) and ``namespace`` of process numbers."""
    return {"pid": os.getpid(), "started": _started(os.getpid()) or 0, "namespace": _namespace()}


def is_alive(identity: Mapping[str, Any]) -> bool | None:
    """Whether the process still runs; None where it cannot be seen, in another container."""
    if identity.get("namespace") != _namespace():
        return None
    return _started(int(identity["pid"])) == int(identity["started"])


def is_stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal (Ctrl-Z), or by a debugger."""
    fields = _stat(pid)
    return bool(fields) and fields[0] in ("T", "t")


def _started(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may have spaces and brackets in it."""
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
    return []


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
