"""A drive made slower by the kernel: how many bytes this process may read from it per second.

With cgroup version 1 (blkio) or 2 (io); needs root.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")


class Throttle:
    """A cgroup of this process's own, in which reads of the drive under a folder are limited.

    What is written through the page cache is not limited, nor what is read from there.
    """

    def __init__(self, group: Path, device: str, version: int) -> None:
        self._group = group
        self._device = device
        self._version = version

    def limit(self, nbytes_per_s: int | None) -> None:
        """From now on this process reads at most so much; None ends the limit."""
        if self._version == 1:
            text = str(nbytes_per_s or 0)
            (self._group / "blkio.throttle.read_bps_device").write_text(f"{self._device} {text}")
        else:
            text = str(nbytes_per_s or "max")
            (self._group / "io.max").write_text(f"{self._device} rbps={text}")


def why_impossible() -> str | None:
    """What is missing to throttle a drive here, or None."""
    if os.geteuid() != 0:
        return "a cgroup needs root"
    if _version() is None:
        return "no cgroup controller for block devices: neither blkio (v1) nor io (v2)"
    return None


def _version() -> int | None:
    if (_V1 / "cgroup.procs").exists():
        return 1
    controllers = _V2 / "cgroup.subtree_control"
    if controllers.exists() and "io" in (_V2 / "cgroup.controllers").read_text().split():
        return 2
    return None


def device_of(folder: Path) -> str:
    """The whole drive under ``folder``, as cgroups name it: ``7:0``."""
    number = os.stat(folder).st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (place / "partition").exists():
        place = place.parent
    return (place / "dev").read_text().strip()


@contextmanager
def throttled(folder: Path) -> Iterator[Throttle]:
    """This process, and threads that it starts from now on, in a cgroup of their own for as long as
    the block lasts. RuntimeError where that cannot be."""
    if reason := why_impossible():
        raise RuntimeError(f"the drive cannot be throttled: {reason}")
    version = _version()
    assert version is not None
    root = _V1 if version == 1 else _V2
    if version == 2:
        (root / "cgroup.subtree_control").write_text("+io")
    group = Path(tempfile.mkdtemp(prefix="spdk_kv-", dir=root))
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield Throttle(group, device_of(folder), version)
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
