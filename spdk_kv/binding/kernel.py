"""The kernel with its settings open for writing: every change of /sys goes through here."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from spdk_kv.devices.inspection import Kernel


class StepFailed(Exception):
    """A step of a change failed; the message says which, and what the state is now."""


class WritableKernel(Kernel):
    """This machine's kernel and commands, and the one way to change its settings."""

    def write(self, path: Path, text: str) -> None:
        """Writes ``text`` to the attribute ``path`` in one write; never creates a file."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            data = text.encode()
            if os.write(fd, data) != len(data):
                raise OSError(errno.EIO, "written only in part", str(path))
        finally:
            os.close(fd)
