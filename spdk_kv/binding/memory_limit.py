"""A memory cgroup for one measurement: a limit that the page cache and all other memory share.

Works with both versions of the memory controller. It needs root or a delegated part of the tree.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices import Mount, parse_count, read_count, read_mounts, read_text
from spdk_kv.errors import SpdkKvError

_REMOVE_TIMEOUT_S = 5.0
_numbers = itertools.count()


class LimitUnavailable(SpdkKvError):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True)
class MemoryUse:
    """What a group holds at one moment.

    Attributes:
        cache_nbytes: page cache, without shared memory.
        other_nbytes: all the rest: anonymous and pinned memory, and the kernel's on their behalf.
        major_faults: page faults so far that had to read from storage.
    """

    cache_nbytes: int
    other_nbytes: int
    major_faults: int


class MemoryGroup:
    """One memory cgroup: a child of this process's own (v1), or a sibling of it (v2)."""

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version

    def limit(self, nbytes: int | None) -> None:
        """Sets the limit; None lifts it. Blocks while the kernel reclaims what exceeds it.

        Raises LimitUnavailable if the kernel could not reclaim enough.
        """
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        none = "max" if self.version == 2 else "-1"
        self._write(name, none if nbytes is None else str(nbytes))

    def forbid_swap(self) -> None:
        """Makes the kernel drop page cache at the limit, and never swap anonymous memory."""
        with suppress(LimitUnavailable):  # a kernel without swap accounting has no such file
            if self.version == 2:
                self._write("memory.swap.max", "0")
            else:
                self._write("memory.swappiness", "0")

    def add(self, pid: int) -> None:
        """Moves a process in. What it held before stays charged to its former group."""
        self._write("cgroup.procs", str(pid))

    def use(self) -> MemoryUse:
        """What the group holds now; reads small files."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        before = read_count(self.path / name) or 0
        stat = self.stat()
        # The files are not of one moment: what the page cache gains or loses between them must not
        # pass for other memory.
        used = min(before, read_count(self.path / name) or 0)
        if self.version == 2:
            cache = stat.get("file", 0) - stat.get("shmem", 0)
        else:
            cache = stat.get("total_cache", 0) - stat.get("total_shmem", 0)
        faults = stat.get("pgmajfault", stat.get("total_pgmajfault", 0))
        return MemoryUse(cache, max(0, used - cache), faults)

    def peak_nbytes(self) -> int | None:
        """The most that the group ever held, page cache included.

        None where the kernel does not record it (v2 before Linux 5.19).
        """
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return read_count(self.path / name)

    def stat(self) -> dict[str, int]:
        """The fields of ``memory.stat`` that are counts."""
        fields = {}
        for line in (read_text(self.path / "memory.stat") or "").splitlines():
            name, _, text = line.partition(" ")
            if (count := parse_count(text)) is not None:
                fields[name] = count
        return fields

    def remove(self) -> None:
        """Removes the group, whose processes must have ended. Raises LimitUnavailable."""
        until = time.monotonic() + _REMOVE_TIMEOUT_S
        while True:
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as refused:
                # The kernel may count a process for a moment after it was waited for.
                if time.monotonic() > until:
                    raise LimitUnavailable(
                        f"cannot remove {self.path}: {refused.strerror}"
                    ) from refused
            time.sleep(0.02)

    def _write(self, name: str, text: str) -> None:
        try:
            (self.path / name).write_text(text)
        except OSError as refused:
            raise LimitUnavailable(f"{self.path / name}: {refused.strerror}") from refused


def make_group(root: Path = Path("/")) -> MemoryGroup:
    """A new, empty group without a limit. Raises LimitUnavailable."""
    version, parents = _parents(root)
    name = f"spdk_kv-{os.getpid()}-{next(_numbers)}"
    why = "there is no usable memory controller"
    for parent in parents:
        try:
            if version == 2:
                _delegate_memory(parent)
            (parent / name).mkdir()
        except OSError as refused:
            why = f"{parent}: {refused.strerror}"
            continue
        group = MemoryGroup(parent / name, version)
        needed = "memory.max" if version == 2 else "memory.limit_in_bytes"
        if (group.path / needed).exists():
            return group
        group.remove()
        why = f"{parent}: its children have no {needed}"
    raise LimitUnavailable(f"no memory cgroup can be made: {why}")


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A new group that is removed at the end of the block. Raises LimitUnavailable."""
    group = make_group()
    try:
        yield group
    finally:
        group.remove()


def why_impossible() -> str | None:
    """Why this process can make no group; None if it can."""
    try:
        make_group().remove()
    except LimitUnavailable as reason:
        return str(reason)
    return None


def _parents(root: Path) -> tuple[int, list[Path]]:
    """The controller's version, and where a group may be made, the best place first."""
    version, path = _membership(read_text(root / "proc/self/cgroup") or "")
    mount = _controller_mount(read_mounts(root), version)
    if mount is None:
        raise LimitUnavailable("no memory cgroup can be made: the controller is not mounted")
    top = root / mount.mount_point.lstrip("/")
    own = top / os.path.relpath(path, mount.root)
    if ".." in own.relative_to(top).parts or not own.exists():
        own = top  # the group lies outside of what is mounted here, as in some containers
    above = [parent for parent in own.parents if parent.is_relative_to(top)]
    # v2: a group that has processes can have no children with controllers, unless it is the root.
    return (1, [own, *above]) if version == 1 else (2, [*above, own])


def _membership(text: str) -> tuple[int, str]:
    unified = "/"
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return 1, path
        if number == "0" and not controllers:
            unified = path
    return 2, unified


def _controller_mount(mounts: tuple[Mount, ...], version: int) -> Mount | None:
    for mount in mounts:
        if version == 2 and mount.fstype == "cgroup2":
            return mount
        if version == 1 and mount.fstype == "cgroup" and "memory" in mount.options:
            return mount
    return None


def _delegate_memory(parent: Path) -> None:
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")
