"""Programs on a terminal: a pty, and what they show on it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Sequence

from support.waiting import PATIENCE_S, PROCESS_PATIENCE_S


def read_terminal(
    primary: int, until: Callable[[bytes], bool], timeout_s: float = PROCESS_PATIENCE_S
) -> bytes:
    """What is shown on ``primary``, up to when it satisfies ``until`` or its last writer goes."""
    shown, deadline = b"", time.monotonic() + timeout_s
    while not until(shown):
        assert time.monotonic() < deadline, shown
        if not select.select([primary], [], [], 1)[0]:
            continue
        try:
            piece = os.read(primary, 65536)
        except OSError:  # Linux says EIO once the last writer is gone
            break
        if not piece:
            break
        shown += piece
    return shown


def run_on_terminal(command: Sequence[str], width: int = 80) -> str:
    """What ``command`` shows on a terminal of ``width`` columns (stdout and stderr together)."""
    primary, secondary = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")}
    process = subprocess.Popen(
        command, stdout=secondary, stderr=secondary,
        env=env | {"TERM": "xterm", "COLUMNS": str(width)},
    )  # fmt: skip
    os.close(secondary)
    try:
        shown = read_terminal(primary, lambda shown: False)
    finally:
        os.close(primary)
        if process.poll() is None:
            process.wait(timeout=PATIENCE_S)
    assert process.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")
