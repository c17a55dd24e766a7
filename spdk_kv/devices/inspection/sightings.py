"""What every process has mounted and open, read from /proc once for any number of drives.

Reading takes seconds on a machine with many processes; looking for a drive in it takes no time.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.stack import Place, Stack, look_up
from spdk_kv.devices.inspection.strict import Unreadable, listing, optional_text
from spdk_kv.devices.mounts import Mount, parse_mounts

# Errors of the files of a process that is ending, or is a zombie.
_GONE = {errno.ENOENT, errno.ESRCH, errno.ENOTDIR}
_ENDING_CHECKS = 20  # 10 ms apart, until its state says so


@dataclass
class Opened:
    """What a process has open or mapped that may be a device node.

    Attributes:
        places: where paths below /dev lead.
        numbers: device numbers of what is open, whatever its path.
        registered: last components of the paths of files that io_urings hold.
    """

    places: set[Place] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)
    registered: set[str] = field(default_factory=set)

    def on(self, stack: Stack) -> set[str]:
        """The names of those that belong to ``stack``. Raises Unreadable."""
        found = {device for place in self.places if (device := place.member(stack))}
        found |= {stack.numbers[number] for number in self.numbers if number in stack.numbers}
        return found | (stack.names & self.registered)


@dataclass(frozen=True)
class Process:
    """One other process."""

    pid: str
    name: str
    opened: Opened


class Sightings:
    """One look at all processes. Mounts and open files are each read on first use, then kept.

    It is as old as that first use, so every decision needs a new one.
    """

    def __init__(self, root: Path, kernel: Kernel) -> None:
        self._root = root
        self._kernel = kernel
        self._places: dict[str, Place] = {}

    def place(self, path: str) -> Place:
        """Where ``path`` led when it was first asked for. Raises Unreadable."""
        if path not in self._places:
            self._places[path] = look_up(self._root, self._kernel, path)
        return self._places[path]

    def mounts(self) -> dict[Mount, str]:
        """Every mount that any thread sees, with the PID of one that does. Raises Unreadable."""
        return self._mounts

    @cached_property
    def _mounts(self) -> dict[Mount, str]:
        return _read_all_mounts(self._root)

    def processes(self) -> Iterator[Process]:
        """Every other process. Raises Unreadable after yielding those that could be read."""
        read, trouble = self._processes
        yield from read
        if trouble is not None:
            raise trouble.with_traceback(None)

    @cached_property
    def _processes(self) -> tuple[list[Process], Unreadable | None]:
        read: list[Process] = []
        try:
            for pid, tasks in _processes(self._root):
                if pid == str(os.getpid()):
                    continue
                opened = self.opened(tasks)
                self.map_into(opened, tasks)
                name = (optional_text(self._root / "proc" / pid / "comm") or "?").strip()
                read.append(Process(pid, name, opened))
        except Unreadable as error:
            return read, error
        return read, None

    def opened(self, tasks: list[Path]) -> Opened:
        """What the threads ``tasks`` have open. Raises Unreadable."""
        found = Opened()
        for task in tasks:
            try:
                for number in os.listdir(task / "fd"):
                    self._add_descriptor(found, task, number)
            except OSError as error:
                if not _gone(task, error):
                    raise Unreadable(f"{task / 'fd'}: {error.strerror}") from error
        return found

    def map_into(self, found: Opened, tasks: list[Path]) -> None:
        """Adds what is mapped, which stays open after its descriptor was closed."""
        for task in tasks:
            try:
                text = (task / "maps").read_bytes().decode(errors="backslashreplace")
            except ProcessLookupError:
                continue  # a kernel thread, which has no memory (since Linux 6.15), or it has ended
            except OSError as error:
                if _gone(task, error):
                    continue
                raise Unreadable(f"{task / 'maps'}: {error.strerror}") from error
            if not text:
                continue  # this thread has ended; the others share its memory
            lines = (line.split(maxsplit=5) for line in text.split("\n"))
            # One range per file, which its device, inode and path identify.
            files = {tuple(words[3:]): words[0] for words in lines if len(words) == 6}
            for (_, _, path), addresses in files.items():
                if path.startswith("/"):
                    self._add_mapping(found, task, path, addresses)
            return

    def _add_mapping(self, found: Opened, task: Path, path: str, addresses: str) -> None:
        if path.startswith("/dev/"):
            found.places.add(self.place(path.removesuffix(" (deleted)")))
        # maps pads addresses with zeros; map_files, which only the process has, does not.
        name = "-".join(f"{int(address, 16):x}" for address in addresses.split("-"))
        try:
            number = self._kernel.device_number(task.parent.parent / "map_files" / name)
        except (FileNotFoundError, ProcessLookupError):  # unmapped meanwhile
            return
        except OSError as error:
            raise Unreadable(f"{task.parent.parent / 'map_files'}: {error.strerror}") from error
        if number is not None:
            found.numbers.add(number)

    def _add_descriptor(self, found: Opened, folder: Path, number: str) -> None:
        link = folder / "fd" / number
        try:
            target = os.readlink(link)
            if target == "anon_inode:[io_uring]":
                fdinfo = (folder / "fdinfo" / number).read_text(errors="replace")
                found.registered |= _registered(fdinfo)
            if not target.startswith("/"):
                return
            name = target.removesuffix(" (deleted)")
            if name.startswith("/dev/"):
                found.places.add(self.place(name))
            device = self._kernel.device_number(link)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):  # closed meanwhile
                return
            raise
        if device is not None:
            found.numbers.add(device)


def _processes(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Every PID with the folders of its threads.

    Threads may have their own mounts and descriptors (unshare(2)), and a process whose first thread
    has ended shows its own only there.
    """
    pids = [name for name in listing(root / "proc") if name.isdigit()]
    if not pids:
        raise Unreadable(f"{root / 'proc'}: shows no process")
    for pid in pids:
        tasks = root / "proc" / pid / "task"
        yield pid, [tasks / task for task in listing(tasks)]


def _gone(task: Path, error: OSError) -> bool:
    """Whether ``error`` only means that thread ``task`` has ended, or is a zombie."""
    if error.errno not in _GONE:
        return False
    for _ in range(_ENDING_CHECKS):
        status = optional_text(task / "status")
        if status is None or re.search(r"^State:\s*[ZX]", status, re.MULTILINE):
            return True
        time.sleep(0.01)
    return False


def _read_all_mounts(root: Path) -> dict[Mount, str]:
    """Every mount that any thread sees, with the PID of one that does. Raises Unreadable."""
    found: dict[Mount, str] = {}
    seen = set()
    for pid, tasks in _processes(root):
        for task in tasks:
            path = task / "mountinfo"
            try:
                text = path.read_bytes().decode(errors="backslashreplace")
            except OSError as error:
                # EINVAL: it is ending and has left its mount namespace (mounts_open_common in
                # fs/proc_namespace.c), though it may take minutes more to end.
                if error.errno == errno.EINVAL or _gone(task, error):
                    continue
                raise Unreadable(f"{path}: {error.strerror}") from error
            if text in seen:
                continue
            seen.add(text)
            mounts = parse_mounts(text)
            if len(mounts) != sum(1 for line in text.split("\n") if line):
                raise Unreadable(f"{path}: has lines of an unknown form")
            for mount in mounts:
                found.setdefault(mount, pid)
    return found


def _registered(fdinfo: str) -> set[str]:
    """Files registered with an io_uring, which stay open after their descriptors were closed."""
    lines = fdinfo.partition("UserFiles:")[2].partition("UserBufs:")[0].splitlines()
    return {line.partition(":")[2].strip().rpartition("/")[2] for line in lines}
