"""What every process has mounted and open, from /proc; one's own descriptors are left out."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from spdk_kv.devices.kernel import Kernel
from spdk_kv.devices.mounts import Mount, parse_mounts
from spdk_kv.devices.reasons import Code, Reason
from spdk_kv.devices.stack import Stack, member_at
from spdk_kv.devices.strict import Unreadable, listing, optional_link, optional_text

# include/linux/proc_ns.h: the first namespaces of a boot have fixed inodes.
_FIRST_NAMESPACES = {"pid": "pid:[4026531836]", "user": "user:[4026531837]"}
_SYSTEM_MOUNTS = re.compile(r"/|/(boot|efi|usr)(/.*)?")
# What a process that is ending, or a zombie, answers.
_GONE = {errno.ENOENT, errno.ESRCH, errno.ENOTDIR}
_ENDING_CHECKS = 20


def check_host(root: Path) -> Iterator[Reason]:
    """Whether this process sees the whole machine: in a container it would miss mounts and users.

    Raises Unreadable.
    """
    own = root / "proc/self/ns"
    for name, first in _FIRST_NAMESPACES.items():
        if (found := optional_link(own / name)) != first:
            yield Reason(Code.NOT_HOST, f"this process runs in {name} namespace {found}: use a "
                         "shell of the host")  # fmt: skip
    mine, host = optional_link(own / "mnt"), optional_link(root / "proc/1/ns/mnt")
    if mine is None or mine != host:
        yield Reason(Code.NOT_HOST, f"this process has mount namespace {mine}, process 1 {host}: "
                     "use a shell of the host")  # fmt: skip


def _processes(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Every PID with the folders of its threads.

    Threads may have mounts and descriptors of their own (unshare(2)), and those of a process
    whose first thread has ended are found in no other place.
    """
    pids = [name for name in listing(root / "proc") if name.isdigit()]
    if not pids:
        raise Unreadable(f"{root / 'proc'}: shows no process")
    for pid in pids:
        tasks = root / "proc" / pid / "task"
        yield pid, [tasks / task for task in listing(tasks)]


def _gone(task: Path, error: OSError) -> bool:
    """Whether ``error`` only says that thread ``task`` has ended meanwhile, or is a zombie."""
    if error.errno not in _GONE:
        return False
    for _ in range(_ENDING_CHECKS):
        status = optional_text(task / "status")
        if status is None or re.search(r"^State:\s*[ZX]", status, re.MULTILINE):
            return True
        time.sleep(0.01)
    return False


def read_all_mounts(root: Path) -> dict[Mount, str]:
    """Every mount that any thread sees -> the PID of one such. Raises Unreadable."""
    found: dict[Mount, str] = {}
    seen = set()
    for pid, tasks in _processes(root):
        for task in tasks:
            path = task / "mountinfo"
            try:
                text = path.read_bytes().decode(errors="backslashreplace")
            except OSError as error:
                # EINVAL: it is ending and has left its mount namespace (mounts_open_common in
                # fs/proc_namespace.c), though what it waits for may take it minutes yet.
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


def check_mounts(root: Path, kernel: Kernel, stack: Stack) -> Iterator[Reason]:
    """Mounts of anything on the drive, in any process's mount table. Raises Unreadable."""
    members = _filesystem_members(root, stack)
    for mount, pid in read_all_mounts(root).items():
        device = stack.numbers.get(f"b{mount.device}")
        # btrfs shows a number of its own; bcachefs lists its devices with colons between.
        for source in mount.source.split(":"):
            device = device or member_at(root, kernel, stack, source)
        if device is None and mount.fstype == "btrfs":
            # Of several devices the mount names one, which may be on another drive.
            device = members.get(mount.source.rpartition("/")[2])
        if device is None:
            continue
        where = f"{device} on {mount.mount_point} ({mount.fstype}), seen by process {pid}"
        yield Reason(Code.MOUNTED, where)
        if _SYSTEM_MOUNTS.fullmatch(mount.mount_point):
            yield Reason(Code.SYSTEM, f"{device} carries {mount.mount_point}")


def _filesystem_members(root: Path, stack: Stack) -> dict[str, str]:
    """Each device of a btrfs that uses the drive -> the drive's device in it."""
    found: dict[str, str] = {}
    for uuid in listing(root / "sys/fs/btrfs"):
        devices = listing(root / "sys/fs/btrfs" / uuid / "devices")
        if ours := [name for name in devices if name in stack.names]:
            found |= dict.fromkeys(devices, ours[0])
    return found


def check_btrfs(root: Path, stack: Stack) -> Iterator[Reason]:
    """Filesystems of several devices that are assembled, whether mounted in sight or not."""
    for device, ours in _filesystem_members(root, stack).items():
        if device == ours:
            yield Reason(Code.HOLDER, f"{ours} belongs to a btrfs that is in use")


def check_open(root: Path, kernel: Kernel, stack: Stack) -> Iterator[Reason]:
    """Descriptors, mappings and io_uring files on any node of the drive. Raises Unreadable."""
    for pid, tasks in _processes(root):
        if pid == str(os.getpid()):
            continue
        opened = _descriptors(root, kernel, stack, tasks)
        for device in sorted(opened | _mapped(root, kernel, stack, tasks)):
            name = (optional_text(root / "proc" / pid / "comm") or "?").strip()
            yield Reason(Code.OPEN, f"{device} by process {pid} ({name})")


def check_nodes_open(root: Path, kernel: Kernel, nodes: Iterable[str]) -> Iterator[Reason]:
    """The same for the character devices ``nodes``, given by path. Raises Unreadable, OSError."""
    paths = {node: node for node in nodes}
    numbers = {
        number: node
        for node in paths
        if (place := root / node.lstrip("/")).exists()
        and (number := kernel.device_number(place)) is not None
    }
    yield from check_open(root, kernel, Stack((), (), (), (), numbers, paths))


def _descriptors(root: Path, kernel: Kernel, stack: Stack, tasks: list[Path]) -> set[str]:
    found: set[str] = set()
    for task in tasks:
        try:
            for number in os.listdir(task / "fd"):
                found |= _descriptor(root, kernel, stack, task, number)
        except OSError as error:
            if not _gone(task, error):
                raise Unreadable(f"{task / 'fd'}: {error.strerror}") from error
    return found


def _mapped(root: Path, kernel: Kernel, stack: Stack, tasks: list[Path]) -> set[str]:
    """What is mapped into memory: that stays open after its descriptor was closed."""
    for task in tasks:
        try:
            text = (task / "maps").read_bytes().decode(errors="backslashreplace")
        except ProcessLookupError:
            continue  # it has no memory: a thread of the kernel (since 6.15), or ended
        except OSError as error:
            if _gone(task, error):
                continue
            raise Unreadable(f"{task / 'maps'}: {error.strerror}") from error
        if not text:
            continue  # this thread has ended; the others share the memory
        lines = (line.split(maxsplit=5) for line in text.split("\n"))
        # One range per file: device, inode and path tell it from others.
        files = {tuple(words[3:]): words[0] for words in lines if len(words) == 6}
        return {
            device
            for (_, _, path), addresses in files.items()
            if path.startswith("/")
            and (device := _mapping(root, kernel, stack, task, path, addresses))
        }
    return set()


def _mapping(
    root: Path, kernel: Kernel, stack: Stack, task: Path, path: str, addresses: str
) -> str | None:
    if path.startswith("/dev/"):
        device = member_at(root, kernel, stack, path.removesuffix(" (deleted)"))
        if device is not None:
            return device
    # maps pads addresses with zeros, map_files (of the process, not the thread) does not.
    name = "-".join(f"{int(address, 16):x}" for address in addresses.split("-"))
    try:
        number = kernel.device_number(task.parent.parent / "map_files" / name)
    except (FileNotFoundError, ProcessLookupError):  # unmapped meanwhile
        return None
    except OSError as error:
        raise Unreadable(f"{task.parent.parent / 'map_files'}: {error.strerror}") from error
    return stack.numbers.get(number or "")


def _descriptor(root: Path, kernel: Kernel, stack: Stack, folder: Path, number: str) -> set[str]:
    link = folder / "fd" / number
    try:
        target = os.readlink(link)
        if target == "anon_inode:[io_uring]":
            return _registered(stack, (folder / "fdinfo" / number).read_text(errors="replace"))
        if not target.startswith("/"):
            return set()
        name = target.removesuffix(" (deleted)")
        device = member_at(root, kernel, stack, name) if name.startswith("/dev/") else None
        device = device or stack.numbers.get(kernel.device_number(link) or "")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):  # closed meanwhile
            return set()
        raise
    return {device} if device else set()


def _registered(stack: Stack, fdinfo: str) -> set[str]:
    """Files registered with an io_uring stay open after their descriptors were closed."""
    lines = fdinfo.partition("UserFiles:")[2].partition("UserBufs:")[0].splitlines()
    named = {line.partition(":")[2].strip().rpartition("/")[2] for line in lines}
    return set(stack.names & named)
