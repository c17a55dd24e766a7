"""Real block devices and filesystems for tests: loop devices, small mounts, frozen filesystems.

They need root and the kernel's loop driver; where those are missing the test skips and says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.waiting import PATIENCE_S

_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
# A test that hangs on a frozen filesystem could not even be killed.
_LONGEST_FREEZE_S = PATIENCE_S


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        pytest.skip(f"{what} needs root")


def _tool(*command: str) -> str:
    """Runs a system tool and returns what it printed; skips where it is missing or refuses."""
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=PATIENCE_S
        )
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"{' '.join(command)}: {refused.stderr.strip()}")
    return ran.stdout.strip()


@contextlib.contextmanager
def loop_device(image: Path, *options: str) -> Iterator[str]:
    """``image`` as a block device; yields its node."""
    _need_root("a loop device")
    node = _tool("losetup", "--find", "--show", *options, str(image))
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=False, timeout=PATIENCE_S)


@contextlib.contextmanager
def partition(image: Path) -> Iterator[str]:
    """The one partition of ``image``, from 1 MiB to its end, as a block device."""
    first, count = 2048, image.stat().st_size // 512 - 2048
    with loop_device(image, "--partscan") as node:
        # Told to the kernel as it is: a table would need a kernel that understands tables.
        _tool("addpart", node, "1", str(first), str(count))
        name = f"{os.path.basename(node)}p1"
        number = Path(f"/sys/class/block/{name}/dev").read_text()
        # A node of our own, since in a container nothing makes the one in /dev.
        made = image.with_name(name)
        os.mknod(made, stat.S_IFBLK | 0o600, os.makedev(*map(int, number.split(":"))))
        try:
            yield str(made)
        finally:
            made.unlink()


@contextlib.contextmanager
def ext4(folder: Path, nbytes: int) -> Iterator[Path]:
    """A fresh ext4 of ``nbytes`` on a loop device; yields where it is mounted."""
    _need_root("mounting")
    image, at = folder / "ext4.img", folder / "ext4"
    with open(image, "wb") as file:
        file.truncate(nbytes)
    # No reserved blocks and no delayed initialisation: what is free can be used, by all, at once.
    extended = "lazy_itable_init=0,lazy_journal_init=0"
    _tool("mkfs.ext4", "-q", "-F", "-m", "0", "-E", extended, str(image))
    at.mkdir()
    with loop_device(image) as node:
        _tool("mount", node, str(at))
        try:
            yield at
        finally:
            _unmount(at)


def _unmount(at: Path) -> None:
    # Of a process that ended, the kernel closes a ring's files a little later.
    until = time.monotonic() + PATIENCE_S
    while subprocess.run(
        ["umount", str(at)], timeout=PATIENCE_S, stderr=subprocess.DEVNULL
    ).returncode:
        assert time.monotonic() < until, f"something still uses {at}"
        time.sleep(0.02)


@contextlib.contextmanager
def ramfs(folder: Path) -> Iterator[Path]:
    """A filesystem that has no O_DIRECT."""
    _need_root("mounting")
    folder.mkdir(exist_ok=True)
    _tool("mount", "-t", "ramfs", "none", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=PATIENCE_S)


class HungDevice:
    """A block device whose writes hang until :meth:`thaw`: a loop device over a file on a
    filesystem that :meth:`freeze` has frozen. Reads go on. ``is_frozen``: whether they hang, which
    they do for two minutes at most."""

    def __init__(self, node: str, backing: Path) -> None:
        self.node = node
        self.backing = backing
        self._fd = os.open(backing.parent, os.O_RDONLY)
        self.is_frozen = False
        self._watchdog: threading.Timer | None = None

    def freeze(self) -> None:
        fcntl.ioctl(self._fd, _FIFREEZE, 0)
        self.is_frozen = True
        self._watchdog = threading.Timer(_LONGEST_FREEZE_S, self.thaw)
        self._watchdog.daemon = True
        self._watchdog.start()

    def thaw(self) -> None:
        if self.is_frozen:
            self.is_frozen = False
            fcntl.ioctl(self._fd, _FITHAW, 0)

    def close(self) -> None:
        self.thaw()
        if self._watchdog is not None:
            self._watchdog.cancel()
        os.close(self._fd)


@contextlib.contextmanager
def hung_device(folder: Path, nbytes: int) -> Iterator[HungDevice]:
    with ext4(folder, 4 * nbytes + (16 << 20)) as at:
        backing = at / "backing"
        backing.write_bytes(bytes(nbytes))
        # Loop's own direct I/O is off: its worker hangs in the frozen filesystem's write path.
        with loop_device(backing) as node:
            device = HungDevice(node, backing)
            try:
                yield device
            finally:
                device.close()
