"""A memory cgroup made for one measurement: a limit that page cache and buffers share.

Both versions of the memory controller. Making one needs root, or a delegated part of the tree.
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
    """What a group's processes hold, and its page faults that had to read, at one moment.

    ``cache_nbytes``: page cache, shared memory left out; ``other_nbytes``: all the rest, anonymous
    and pinned memory and the kernel's own on their behalf.
    """

    cache_nbytes: int
    other_nbytes: int
    major_faults: int


class MemoryGroup:
    """One memory cgroup, below this process's own (v1) or beside it (v2)."""

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version

    def limit(self, nbytes: int | None) -> None:
        """Sets the limit; None lifts it. Blocks while the kernel reclaims what is above it.
        LimitUnavailable where the kernel refuses (it could not reclaim enough)."""
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        none = "max" if self.version == 2 else "-1"
        self._write(name, none if nbytes is None else str(nbytes))

    def forbid_swap(self) -> None:
        """What does not fit is page cache dropped, never anonymous memory swapped."""
        with suppress(LimitUnavailable):  # a kernel without swap accounting has no such file
            if self.version == 2:
                self._write("memory.swap.max", "0")
            else:
                self._write("memory.swappiness", "0")

    def add(self, pid: int) -> None:
        """Moves a process in; what it held before stays charged to where it was."""
        self._write("cgroup.procs", str(pid))

    def use(self) -> MemoryUse:
        """What the group holds now. Cheap: two small files."""
        stat = self.stat()
        if self.version == 2:
            cache = stat.get("file", 0) - stat.get("shmem", 0)
            used = read_count(self.path / "memory.current")
        else:
            cache = stat.get("total_cache", 0) - stat.get("total_shmem", 0)
            used = read_count(self.path / "memory.usage_in_bytes")
        faults = stat.get("pgmajfault", stat.get("total_pgmajfault", 0))
        return MemoryUse(cache, max(0, (used or 0) - cache), faults)

    def peak_nbytes(self) -> int | None:
        """The most that the group ever held, page cache included; None where the kernel does not
        say (v2 before 5.19)."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return read_count(self.path / name)

    def stat(self) -> dict[str, int]:
        """The fields of ``memory.stat``; what is no count is left out."""
        fields = {}
        for line in (read_text(self.path / "memory.stat") or "").splitlines():
            name, _, text = line.partition(" ")
            if (count := parse_count(text)) is not None:
                fields[name] = count
        return fields

    def remove(self) -> None:
        """Removes the group; its processes must have ended. LimitUnavailable if it stays."""
        until = time.monotonic() + _REMOVE_TIMEOUT_S
        while True:
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as refused:
                # A process that was waited for may still count for a moment.
                if time.monotonic() > until:
                    raise LimitUnavailable(f"{self.path} stays: {refused.strerror}") from refused
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
    why = "no memory controller that could be used"
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
    """A new group as long as the block lasts."""
    group = make_group()
    try:
        yield group
    finally:
        group.remove()


def why_impossible() -> str | None:
    """Why no group can be made by this process, or None."""
    try:
        make_group().remove()
    except LimitUnavailable as reason:
        return str(reason)
    return None


def _parents(root: Path) -> tuple[int, list[Path]]:
    """The version, and where a group may be made, the best place first."""
    version, path = _membership(read_text(root / "proc/self/cgroup") or "")
    mount = _controller_mount(read_mounts(root), version)
    if mount is None:
        raise LimitUnavailable("no memory cgroup can be made: the controller is not mounted")
    top = root / mount.mount_point.lstrip("/")
    own = top / os.path.relpath(path, mount.root)
    if ".." in own.relative_to(top).parts or not own.exists():
        own = top  # outside of what is mounted here, as in some containers
    above = [parent for parent in own.parents if parent.is_relative_to(top)]
    # v2: a group with processes of its own can have no children with controllers (the root can).
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
