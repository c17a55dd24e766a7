"""The memory cgroups around this process: found once, then read repeatedly."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spdk_kv.devices import Mount, exists, parse_count, parse_mounts

# The stripped text of a file, or None where it cannot be read.
ReadText = Callable[[str], str | None]

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2^63.
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class CgroupLimit:
    """One cgroup with a memory limit, this process's own or one around it.

    ``reclaimable_nbytes``: its page cache, which counts as usage but gives way under pressure;
    without what is mapped (libraries, weights), which looks reclaimable and is in use.
    """

    path: str
    limit_nbytes: int
    usage_nbytes: int
    reclaimable_nbytes: int

    @property
    def headroom_nbytes(self) -> int:
        """Bytes that page cache could hold here: what is free and what is page cache already."""
        free = self.limit_nbytes - self.usage_nbytes + self.reclaimable_nbytes
        return max(0, min(free, self.limit_nbytes))


@dataclass(frozen=True)
class _Names:
    """What a version of the hierarchy calls its files, and the lines of its memory.stat."""

    limits: tuple[str, ...]
    usage: str
    file_lru: tuple[str, str]
    mapped: str
    # Names the limit of cgroups above a container's mount, in memory.stat of the innermost one.
    hierarchical: str | None = None


_NAMES = {
    1: _Names(
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        # Without total_ a cgroup's numbers leave out its children, unlike its usage.
        ("total_active_file", "total_inactive_file"),
        "total_mapped_file",
        "hierarchical_memory_limit",
    ),
    # Above memory.high allocation is throttled until it crawls: as good as a limit.
    2: _Names(
        ("memory.max", "memory.high"),
        "memory.current",
        ("active_file", "inactive_file"),
        "file_mapped",
    ),
}


class MemoryCgroups:
    """The memory cgroups of this process, from its own up to the mount point.

    ``levels``: their directories, innermost first. ``pressure_files``: v2's files with their PSI.
    ``notes``: what was missing or odd when they were searched for.
    """

    def __init__(self, root: Path, read_text: ReadText) -> None:
        self._root = root
        self._read_text = read_text
        self.notes: list[str] = []
        self.levels: tuple[str, ...] = ()
        self.pressure_files: tuple[str, ...] = ()
        membership = self._membership()
        if membership is None:
            return
        version, path = membership
        self._names = _NAMES[version]
        mount = self._mount(version, path)
        if mount is None:
            return
        top = root / mount.mount_point.lstrip("/")
        own = top / self._below(path, mount)
        while own != top and not exists(own):
            self._note(self.notes, str(own), "missing")
            own = own.parent
        within = [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
        self.levels = tuple(str(level) for level in within)
        # The machine's own root cgroup has no limits in v2.
        self._limit_names = [self._names.limits for _ in self.levels]
        if version == 2:
            files = (f"{level}/memory.pressure" for level in self.levels)
            self.pressure_files = tuple(file for file in files if os.path.exists(file))
            self._limit_names[-1] = tuple(n for n in self._names.limits if exists(top / n))

    def limits(self, notes: list[str]) -> tuple[CgroupLimit, ...]:
        """The cgroups that limit, innermost first; notes what was unreadable or nonsense."""
        found = [self._read(place, notes) for place in range(len(self.levels))]
        return tuple(limit for limit in found if limit is not None)

    def _read(self, place: int, notes: list[str]) -> CgroupLimit | None:
        level = self.levels[place]
        limit = _UNLIMITED
        for name in self._limit_names[place]:
            text = self._read_text(f"{level}/{name}")
            if text != "max":
                count = self._count(f"{level}/{name}", text, notes)
                limit = min(limit, _UNLIMITED if count is None else count)
        stat: Mapping[str, int] | None = None
        if self._names.hierarchical is not None and place == 0:
            stat = self._stat(f"{level}/memory.stat", notes)
            limit = min(limit, stat.get(self._names.hierarchical, _UNLIMITED))
        if limit >= _UNLIMITED:
            return None
        if stat is None:
            stat = self._stat(f"{level}/memory.stat", notes)
        file = f"{level}/{self._names.usage}"
        usage = self._count(file, self._read_text(file), notes)
        cache = sum(stat.get(name, 0) for name in self._names.file_lru)
        reclaimable = max(0, cache - stat.get(self._names.mapped, 0))
        return CgroupLimit(self._shown(level), limit, usage or 0, reclaimable)

    def _membership(self) -> tuple[int, str] | None:
        """The version of the hierarchy that accounts memory, and this process's path in it."""
        file = str(self._root / "proc/self/cgroup")
        unified = None
        for line in (self._read_text(file) or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            # A controller is in one hierarchy only, so v1's memory rules out v2's.
            if "memory" in controllers.split(","):
                return 1, path
            if number == "0" and not controllers:
                unified = path
        if unified is None:
            self._note(self.notes, file, "names no memory cgroup")
            return None
        return 2, unified

    def _mount(self, version: int, path: str) -> Mount | None:
        file = str(self._root / "proc/self/mountinfo")
        mounts = [
            mount
            for mount in parse_mounts(self._read_text(file) or "")
            if (version == 2 and mount.fstype == "cgroup2")
            or (version == 1 and mount.fstype == "cgroup" and "memory" in mount.options)
        ]
        if not mounts:
            self._note(self.notes, file, f"no cgroup v{version} memory mount")
            return None
        return next((mount for mount in mounts if _is_below(path, mount.root)), mounts[0])

    def _below(self, path: str, mount: Mount) -> PurePosixPath:
        if _is_below(path, mount.root):
            return PurePosixPath(path).relative_to(mount.root)
        # A mount from another cgroup namespace: its top is the nearest that can be named.
        file = str(self._root / "proc/self/cgroup")
        self._note(self.notes, file, f"{path} is outside {mount.mount_point}")
        return PurePosixPath()

    def _count(self, file: str, text: str | None, notes: list[str]) -> int | None:
        count = parse_count(text)
        if text is None:
            self._note(notes, file, "missing or unreadable")
        elif count is None:
            self._note(notes, file, f"not a byte count: {text[:40]!r}")
        return count

    def _stat(self, file: str, notes: list[str]) -> Mapping[str, int]:
        text = self._read_text(file)
        wanted = {*self._names.file_lru, self._names.mapped, self._names.hierarchical}
        fields: dict[str, int] = {}
        readable = False
        for line in (text or "").splitlines():
            name, _, value = line.partition(" ")
            if name in wanted or not readable:
                count = parse_count(value)
                if count is not None:
                    fields[name] = count
                    readable = True
        if not readable:
            what = "missing or unreadable" if text is None else "not a list of counts"
            self._note(notes, file, what)
        return fields

    def _shown(self, file: str) -> str:
        return f"/{PurePosixPath(file).relative_to(self._root)}"

    def _note(self, notes: list[str], file: str, what: str) -> None:
        notes.append(f"{self._shown(file)}: {what}")


def _is_below(path: str, ancestor: str) -> bool:
    # Seen from a cgroup namespace, what lies outside it starts with "/..".
    pure = PurePosixPath(path)
    return ".." not in (*pure.parts, *PurePosixPath(ancestor).parts) and pure.is_relative_to(
        ancestor
    )
