"""Whether this process may use io_uring, found by trying rather than from the kernel's version."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices.sysfs import read_count

# The number of io_uring_setup on every architecture except alpha (asm-generic/unistd.h).
_IO_URING_SETUP = 425
# struct io_uring_params (linux/io_uring.h): 10 u32, then two offset tables of 40 bytes.
_PARAMS_NBYTES = 120
_FEATURES_AT = 20
# A wait with a timeout that is no command of its own (Linux 5.11), which the engine needs.
_FEATURE_EXT_ARG = 1 << 8


@dataclass(frozen=True)
class IoUringStatus:
    """Whether io_uring is available, and if not, why.

    Attributes:
        too_old: the kernel has io_uring, but lacks what came with Linux 5.11.
        error: the errno of the refusal; None if available.
        sysctl: kernel.io_uring_disabled: 0 for all, 1 privileged only, 2 off; None before 6.6.
    """

    available: bool
    error: int | None
    sysctl: int | None
    too_old: bool = False

    @property
    def reason(self) -> str:
        """What the kernel answered, in words."""
        if self.too_old:
            return "io_uring_setup works, but the kernel is too old (no IORING_FEAT_EXT_ARG)"
        if self.error is None:
            return "io_uring_setup works"
        return f"io_uring_setup failed: {os.strerror(self.error)}"


def probe_io_uring(root: Path = Path("/")) -> IoUringStatus:
    """Sets up a ring of one entry and closes it at once; does not block.

    A seccomp filter that kills instead of failing the call would end the process here; those of
    Docker, Podman and Kubernetes fail it with EPERM or ENOSYS.
    """
    sysctl = read_count(root / "proc/sys/kernel/io_uring_disabled")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    params = ctypes.create_string_buffer(_PARAMS_NBYTES)
    fd = libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_uint(1), params)
    if fd < 0:
        return IoUringStatus(available=False, error=ctypes.get_errno(), sysctl=sysctl)
    os.close(fd)
    return judge_features(int.from_bytes(params.raw[_FEATURES_AT:][:4], sys.byteorder), sysctl)


def judge_features(features: int, sysctl: int | None) -> IoUringStatus:
    """The status of a kernel that set up a ring with these ``features`` (IORING_FEAT_...)."""
    new_enough = bool(features & _FEATURE_EXT_ARG)
    return IoUringStatus(new_enough, None, sysctl, too_old=not new_enough)
