"""A fast drive, simulated: a file on /dev/shm behind a loop device, with ext4 on it.

    python bench/fast_drive.py make [--size 4GiB]     prints where it is mounted
    python bench/fast_drive.py remove MOUNT

Needs root, losetup and mkfs.ext4. Whatever is measured on it is "simulated (loop over tmpfs)":
memory does the work of a drive, and costs CPU time that a drive would not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LABEL = "simulated (loop over tmpfs)"
_TOOLS = ("blockdev", "losetup", "mkfs.ext4", "mount", "umount")
_READ_AHEAD_SECTORS = "256"  # of 512 bytes: 128 KiB
_PREFIX = "spdk_kv-fast-"


def why_impossible() -> str | None:
    """What is missing for a simulated drive on this machine, or None."""
    if os.geteuid() != 0:
        return "a loop device needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def make(nbytes: int) -> Path:
    """Makes the drive and returns where it is mounted. RuntimeError says what went wrong.

    Once it is mounted, the image has no name any more and the loop device goes with the mount:
    one ``umount`` frees everything, and so does a reboot.
    """
    if reason := why_impossible():
        raise RuntimeError(f"no simulated drive: {reason}")
    with ExitStack() as undo:
        handle, image = tempfile.mkstemp(prefix=_PREFIX, suffix=".img", dir="/dev/shm")
        undo.callback(os.unlink, image)
        os.truncate(handle, nbytes)
        os.close(handle)
        device = _run("losetup", "--direct-io=on", "--find", "--show", image)
        # A device in use is detached when its last user goes.
        undo.callback(_run, "losetup", "--detach", device)
        # What an NVMe drive has; a loop device's differs from one time to the next.
        _run("blockdev", "--setra", _READ_AHEAD_SECTORS, device)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        mount = Path(tempfile.mkdtemp(prefix=_PREFIX))
        on_failure = undo.enter_context(ExitStack())
        on_failure.callback(mount.rmdir)
        _run("mount", "-o", "noatime", device, str(mount))
        on_failure.pop_all()
        return mount


def remove(mount: Path) -> None:
    """Unmounts the drive; its memory is free again."""
    if not mount.name.startswith(_PREFIX):
        raise RuntimeError(f"{mount} was not made by {Path(__file__).name}")
    _run("umount", str(mount))
    mount.rmdir()


@contextmanager
def fast_drive(nbytes: int) -> Iterator[Path]:
    """The drive's mount point, as long as the block lasts."""
    mount = make(nbytes)
    try:
        yield mount
    finally:
        remove(mount)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def main() -> None:
    from spdk_kv.units import parse_nbytes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="make it and print its mount point")
    making.add_argument("--size", default="4GiB", type=parse_nbytes)
    removing = commands.add_parser("remove", help="unmount it and free its memory")
    removing.add_argument("mount", type=Path)
    words = parser.parse_args()
    try:
        if words.command == "make":
            print(make(words.size))
        else:
            remove(words.mount)
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")


if __name__ == "__main__":
    main()
