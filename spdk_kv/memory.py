"""How much DRAM the page cache may hold: MemAvailable and the memory cgroups around us.

Inside a container MemAvailable is the host's, so alone it promises memory that the cgroup will
not give. Both are read; the tightest wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spdk_kv.devices.host import read_meminfo
from spdk_kv.devices.mounts import Mount, read_mounts
from spdk_kv.devices.sysfs import exists, parse_count, read_text

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2^63.
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class CgroupLimit:
    """One cgroup with a memory limit, this process's own or one around it.

    ``reclaimable_nbytes``: its page cache, which counts as usage but gives way under pressure.
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
class MemorySnapshot:
    """The memory of the machine and of the cgroups, innermost first, at one moment.

    ``available_nbytes``: MemAvailable, which counts reclaimable page cache; None where unknown.
    ``limits``: only the cgroups that have a limit. ``notes``: each file that was missing,
    unreadable or nonsense, and so stands for "no limit known".
    """

    total_nbytes: int | None
    available_nbytes: int | None
    limits: tuple[CgroupLimit, ...]
    notes: tuple[str, ...]

    @property
    def tightest(self) -> CgroupLimit | None:
        """The cgroup that leaves the least room, or None where none limits."""
        return min(self.limits, key=lambda limit: limit.headroom_nbytes, default=None)


def page_cache_budget(snapshot: MemorySnapshot, reserve_nbytes: int) -> int:
    """Bytes that the page cache may hold for us in all, what it holds already included.

    ``reserve_nbytes`` stays free for others: count in it file-backed model weights, which look
    reclaimable but are needed at every step. 0 where nothing at all is known, so that nobody
    plans with memory that may not be there. Raises ValueError for a negative reserve.
    """
    if reserve_nbytes < 0:
        raise ValueError(f"reserve_nbytes is not negative: {reserve_nbytes}")
    bounds = [limit.headroom_nbytes for limit in snapshot.limits]
    if snapshot.available_nbytes is not None:
        bounds.append(snapshot.available_nbytes)
    return max(0, min(bounds, default=0) - reserve_nbytes)


def read_memory(root: Path = Path("/")) -> MemorySnapshot:
    """Reads a dozen small files of procfs and cgroupfs; does not block, does not raise."""
    notes: list[str] = []
    sizes = read_meminfo(root)
    if "MemAvailable" not in sizes:
        notes.append("/proc/meminfo: no usable MemAvailable")
    return MemorySnapshot(
        total_nbytes=sizes.get("MemTotal"),
        available_nbytes=sizes.get("MemAvailable"),
        limits=_Cgroups(root, notes).limits(),
        notes=tuple(notes),
    )


class _Cgroups:
    """The memory cgroups of this process, from its own up to the mount point."""

    def __init__(self, root: Path, notes: list[str]) -> None:
        self._root = root
        self._notes = notes

    def limits(self) -> tuple[CgroupLimit, ...]:
        membership = self._membership()
        if membership is None:
            return ()
        version, path = membership
        mount = self._mount(version, path)
        if mount is None:
            return ()
        top = self._root / mount.mount_point.lstrip("/")
        own = top / self._below(path, mount)
        while own != top and not exists(own):
            self._note(own, "missing")
            own = own.parent
        levels = [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
        if version == 1:
            found = [self._read_v1(level, innermost=level == own) for level in levels]
        else:
            found = [self._read_v2(level, outermost=level == top) for level in levels]
        return tuple(limit for limit in found if limit is not None)

    def _membership(self) -> tuple[int, str] | None:
        """The version of the hierarchy that accounts memory, and this process's path in it."""
        file = self._root / "proc/self/cgroup"
        unified = None
        for line in (read_text(file) or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            # A controller is in one hierarchy only, so v1's memory rules out v2's.
            if "memory" in controllers.split(","):
                return 1, path
            if number == "0" and not controllers:
                unified = path
        if unified is None:
            self._note(file, "names no memory cgroup")
            return None
        return 2, unified

    def _mount(self, version: int, path: str) -> Mount | None:
        mounts = [
            mount
            for mount in read_mounts(self._root)
            if (version == 2 and mount.fstype == "cgroup2")
            or (version == 1 and mount.fstype == "cgroup" and "memory" in mount.options)
        ]
        if not mounts:
            self._note(self._root / "proc/self/mountinfo", f"no cgroup v{version} memory mount")
            return None
        return next((mount for mount in mounts if _is_below(path, mount.root)), mounts[0])

    def _below(self, path: str, mount: Mount) -> PurePosixPath:
        if _is_below(path, mount.root):
            return PurePosixPath(path).relative_to(mount.root)
        # A mount from another cgroup namespace: its top is the nearest that can be named.
        self._note(self._root / "proc/self/cgroup", f"{path} is outside {mount.mount_point}")
        return PurePosixPath()

    def _read_v1(self, level: Path, *, innermost: bool) -> CgroupLimit | None:
        limit = self._count(level / "memory.limit_in_bytes")
        stat = self._stat(level)
        if innermost and "hierarchical_memory_limit" in stat:
            # Counts the cgroups above the mount point too, which a container cannot see.
            limit = min(stat["hierarchical_memory_limit"], _UNLIMITED if limit is None else limit)
        if limit is None or limit >= _UNLIMITED:
            return None
        # Without total_ a cgroup's numbers leave out its children, unlike its usage.
        reclaimable = stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
        usage = self._count(level / "memory.usage_in_bytes")
        return CgroupLimit(self._name(level), limit, usage or 0, reclaimable)

    def _read_v2(self, level: Path, *, outermost: bool) -> CgroupLimit | None:
        limits = []
        # Above memory.high allocation is throttled until it crawls: as good as a limit.
        for name in ("memory.max", "memory.high"):
            # The machine's root cgroup has neither file.
            if outermost and not exists(level / name):
                continue
            if read_text(level / name) != "max":
                limits.append(self._count(level / name))
        known = [limit for limit in limits if limit is not None]
        if not known:
            return None
        stat = self._stat(level)
        reclaimable = stat.get("active_file", 0) + stat.get("inactive_file", 0)
        usage = self._count(level / "memory.current")
        return CgroupLimit(self._name(level), min(known), usage or 0, reclaimable)

    def _count(self, file: Path) -> int | None:
        text = read_text(file)
        count = parse_count(text)
        if text is None:
            self._note(file, "missing or unreadable")
        elif count is None:
            self._note(file, f"not a byte count: {text[:40]!r}")
        return count

    def _stat(self, level: Path) -> dict[str, int]:
        file = level / "memory.stat"
        text = read_text(file)
        fields: dict[str, int] = {}
        for line in (text or "").splitlines():
            name, _, value = line.partition(" ")
            count = parse_count(value)
            if count is not None:
                fields[name] = count
        if not fields:
            self._note(file, "missing or unreadable" if text is None else "not a list of counts")
        return fields

    def _name(self, path: Path) -> str:
        return f"/{path.relative_to(self._root)}"

    def _note(self, file: Path, what: str) -> None:
        self._notes.append(f"{self._name(file)}: {what}")


def _is_below(path: str, ancestor: str) -> bool:
    # Seen from a cgroup namespace, what lies outside it starts with "/..".
    pure = PurePosixPath(path)
    return ".." not in (*pure.parts, *PurePosixPath(ancestor).parts) and pure.is_relative_to(
        ancestor
    )
