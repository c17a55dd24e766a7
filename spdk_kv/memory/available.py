"""The available memory: how much DRAM the page cache could hold.

Inside a container MemAvailable is the host's, so alone it promises memory that the cgroup will not
give. Both MemAvailable and the memory cgroups around this process are read; the tightest wins.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices import parse_count
from spdk_kv.devices import read_text as read_file
from spdk_kv.memory.cached import cached_nbytes
from spdk_kv.memory.cgroups import CgroupLimit, MemoryCgroups, ReadText
from spdk_kv.units import KIB

__all__ = [
    "AvailableMemory",
    "CgroupLimit",
    "MemoryReader",
    "MemorySnapshot",
    "available_for_page_cache",
    "cached_nbytes",
    "read_memory",
]

_MEMINFO = re.compile(r"^(MemTotal|MemAvailable|Mapped):\s*([0-9]+) kB$", re.MULTILINE)
_SOME_AVG10 = re.compile(r"^some avg10=([0-9]{1,3}(?:\.[0-9]+)?)\s", re.MULTILINE)

# Reads after which files that were missing are searched for again. Chosen: about a minute of decode
# steps.
_SEARCH_AGAIN = 64
_CHUNK_NBYTES = 16 * KIB  # holds each of these files in one read on the machines seen so far


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory of the machine and of the cgroups, innermost first, at one moment.

    Attributes:
        total_nbytes: MemTotal; None where unknown.
        available_nbytes: MemAvailable, which counts reclaimable page cache; None where unknown.
        limits: the cgroups that have a limit.
        notes: each file that was missing, unreadable or nonsense, and so stands for "no limit
            known".
        mapped_nbytes: page cache that processes have mapped (libraries, weights), which looks
            reclaimable and is in use.
        pressure: percentage of the last 10 s in which some task waited for memory (PSI), in the
            innermost cgroup that reports it or else on the machine; None where unknown.
    """

    total_nbytes: int | None
    available_nbytes: int | None
    limits: tuple[CgroupLimit, ...]
    notes: tuple[str, ...]
    mapped_nbytes: int = 0
    pressure: float | None = None

    @property
    def tightest(self) -> CgroupLimit | None:
        """The cgroup that leaves the least room, or None where none limits."""
        return min(self.limits, key=lambda limit: limit.headroom_nbytes, default=None)


@dataclass(frozen=True)
class AvailableMemory:
    """The available memory, and what limits it.

    Attributes:
        nbytes: what the page cache could hold for us in all, including what it holds already.
        limited_by: the cgroup's path, "MemAvailable", "what was given", or "nothing is known".
        pressure: as in :class:`MemorySnapshot`.
        notes: as in :class:`MemorySnapshot`.
    """

    nbytes: int
    limited_by: str
    pressure: float | None
    notes: tuple[str, ...]


def available_for_page_cache(snapshot: MemorySnapshot, reserve_nbytes: int) -> int:
    """Bytes that the page cache could hold for us in all, including what it holds already.

    Args:
        snapshot: what :func:`read_memory` returned.
        reserve_nbytes: bytes that stay free for others: all that will be needed and is not in use
            yet.

    Returns:
        0 where nothing at all is known, so that nobody plans with memory that may not be there.

    Raises:
        ValueError: for a negative reserve.
    """
    return _tightest(snapshot, reserve_nbytes)[0]


def _tightest(snapshot: MemorySnapshot, reserve_nbytes: int) -> tuple[int, str]:
    """The available bytes, and what limits them."""
    if reserve_nbytes < 0:
        raise ValueError(f"reserve_nbytes is not negative: {reserve_nbytes}")
    bounds = [(limit.headroom_nbytes, limit.path) for limit in snapshot.limits]
    if snapshot.available_nbytes is not None:
        bounds.append((snapshot.available_nbytes - snapshot.mapped_nbytes, "MemAvailable"))
    nbytes, name = min(bounds, default=(0, "nothing is known"))
    return max(0, nbytes - reserve_nbytes), name


def read_memory(root: Path = Path("/")) -> MemorySnapshot:
    """Reads a dozen small files of procfs and cgroupfs. Does not block and does not raise."""

    def read_text(path: str) -> str | None:
        return read_file(Path(path))

    return _snapshot(root, read_text, MemoryCgroups(root, read_text))


def _snapshot(root: Path, read_text: ReadText, cgroups: MemoryCgroups) -> MemorySnapshot:
    notes: list[str] = []
    sizes = {}
    for name, digits in _MEMINFO.findall(read_text(f"{root}/proc/meminfo") or ""):
        count = parse_count(digits)
        if count is not None:
            sizes[name] = count * KIB
    if "MemAvailable" not in sizes:
        notes.append("/proc/meminfo: no usable MemAvailable")
    notes += cgroups.notes
    limits = cgroups.limits(notes)
    return MemorySnapshot(
        total_nbytes=sizes.get("MemTotal"),
        available_nbytes=sizes.get("MemAvailable"),
        limits=limits,
        notes=tuple(notes),
        mapped_nbytes=sizes.get("Mapped", 0),
        pressure=_pressure(root, read_text, cgroups),
    )


def _pressure(root: Path, read_text: ReadText, cgroups: MemoryCgroups) -> float | None:
    for file in (*cgroups.pressure_files, f"{root}/proc/pressure/memory"):
        match = _SOME_AVG10.search(read_text(file) or "")
        if match is not None:
            return min(100.0, float(match[1]))
    return None


class MemoryReader:
    """Reads the available memory repeatedly, cheaply enough for every decode step.

    Keeps the files open, notices when the process is moved to another cgroup, and may be used by
    several threads and after a fork.

    Args:
        given_nbytes: the available memory where it is given rather than read.
        reserve_nbytes: as in :func:`available_for_page_cache`.
        root: where ``proc`` and ``sys`` are.

    Raises:
        ValueError: for negative sizes.
    """

    def __init__(
        self, given_nbytes: int | None = None, reserve_nbytes: int = 0, root: Path = Path("/")
    ) -> None:
        if min(given_nbytes or 0, reserve_nbytes) < 0:
            raise ValueError(
                f"given and reserve are not negative: {given_nbytes}, {reserve_nbytes}"
            )
        self._given = given_nbytes
        self._reserve = reserve_nbytes
        self._root = root
        self._lock = threading.Lock()
        self._files = _OpenFiles()
        self._pid = os.getpid()
        self._membership: str | None = None
        self._cgroups: MemoryCgroups | None = None
        self._reads = 0

    def read(self) -> AvailableMemory:
        """The available memory now. Does no I/O on a drive and does not raise."""
        with self._lock:
            cgroups = self._find()
            if self._given is not None:
                pressure = _pressure(self._root, self._files.read, cgroups)
                return AvailableMemory(self._given, "what was given", pressure, ())
            snapshot = _snapshot(self._root, self._files.read, cgroups)
        nbytes, limited_by = _tightest(snapshot, self._reserve)
        return AvailableMemory(nbytes, limited_by, snapshot.pressure, snapshot.notes)

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        with self._lock:
            self._files.close()

    def _find(self) -> MemoryCgroups:
        if self._pid != os.getpid():
            self._files.close()  # /proc/self was opened as the parent's
            self._pid = os.getpid()
        membership = self._files.read(f"{self._root}/proc/self/cgroup")
        again = self._reads % _SEARCH_AGAIN == 0 and self._cgroups and self._cgroups.notes
        self._reads += 1
        if self._cgroups is None or membership != self._membership or again:
            self._files.close()
            self._membership = membership
            self._cgroups = MemoryCgroups(self._root, self._files.read)
        return self._cgroups


class _OpenFiles:
    """Small files of procfs and cgroupfs, which show their present content from offset 0."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def read(self, path: str) -> str | None:
        """The stripped content, as `devices.sysfs.read_text` gives it."""
        for _ in range(2):
            fd = self._fds.get(path)
            fresh = fd is None
            try:
                if fd is None:
                    fd = self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                return _read_all(fd).decode("utf-8", "backslashreplace").strip()
            except (OSError, ValueError):  # ValueError: a NUL in the path
                self._forget(path)
            if fresh:
                break  # otherwise the file was removed, and may have been made anew
        return None

    def close(self) -> None:
        for path in tuple(self._fds):
            self._forget(path)

    def _forget(self, path: str) -> None:
        fd = self._fds.pop(path, None)
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _read_all(fd: int) -> bytes:
    data = os.pread(fd, _CHUNK_NBYTES, 0)
    if len(data) < _CHUNK_NBYTES:
        return data
    parts = [data]
    while more := os.pread(fd, _CHUNK_NBYTES, sum(map(len, parts))):
        parts.append(more)
    return b"".join(parts)
