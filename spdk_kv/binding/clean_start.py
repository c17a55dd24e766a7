"""A clean start for a measurement: an empty page cache, a peak memory that counts from now on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def drop_page_cache() -> None:
    """Writes dirty pages out and empties the machine's page cache. Needs root; raises OSError."""
    os.sync()
    # Documentation/admin-guide/sysctl/vm.rst: 3 drops pages, dentries and inodes.
    Path("/proc/sys/vm/drop_caches").write_text("3")


def reset_peak_rss() -> None:
    """Makes this process's peak resident memory (VmHWM) what is resident now.

    Where the kernel does not allow it, the peak stays that of the process so far.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)
