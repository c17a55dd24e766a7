"""Engine `uring`: io_uring with O_DIRECT on a file, a partition or a drive."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

from spdk_kv._native.holding import Registered
from spdk_kv._native.memory import Region
from spdk_kv.engines.base import QueueOptions
from spdk_kv.engines.files import FileEngine
from spdk_kv.errors import EngineUnavailable, no_descriptors

log = logging.getLogger(__name__)

OLDEST_KERNEL = "5.11"
"""IORING_FEAT_EXT_ARG, a wait with a timeout that is no command of its own, came with Linux 5.11.
All other needs are older (IORING_OP_READ and IORING_SETUP_CLAMP: 5.6). Registered buffers need a
sparse table, which came with 5.19, and completions that are worked on only when asked for
(IORING_SETUP_DEFER_TASKRUN) came with 6.1; on older kernels the engine works without them."""


# Of a ring for one small transfer at a time: its commands, their cancellations and the wake-up.
LONE_ENTRIES = 24


def why_unavailable() -> tuple[str, str] | None:
    """(what is missing, what mends it), or None where io_uring can be used."""
    try:
        from spdk_kv._native.engines.uring import UringBackend
    except ImportError as missing:
        return (
            f"built without liburing ({missing})",
            "apt install liburing-dev pkg-config, then reinstall spdk_kv",
        )
    try:
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as refused:
        return ring_refusal(refused)
    try:
        UringBackend(null, 4).close()
    except OSError as refused:
        return ring_refusal(refused)
    finally:
        os.close(null)
    return None


def ring_refusal(refused: OSError) -> tuple[str, str]:
    """(why the kernel gave no ring, what mends it)."""
    if refused.errno in (errno.ENOSYS, errno.EINVAL):
        # EINVAL: before 5.6 the kernel has io_uring, but not all the flags used here.
        return (
            f"this kernel's io_uring is missing or too old ({refused})",
            f"Linux {OLDEST_KERNEL} or newer",
        )
    if refused.errno == errno.ENOMEM:
        return (
            "RLIMIT_MEMLOCK is too low for a ring (io_uring_setup: ENOMEM)",
            "ulimit -l 65536, or LimitMEMLOCK=64M in the service",
        )
    if remedy := no_descriptors(refused.errno):
        return f"no file descriptor is left for a ring ({refused})", remedy
    return (
        f"io_uring is forbidden here ({refused.strerror})",
        "sysctl kernel.io_uring_disabled=0; in a container, a seccomp profile that allows "
        "io_uring_setup, io_uring_enter and io_uring_register",
    )


class UringEngine(FileEngine):
    """io_uring with O_DIRECT. ``registered_buffers``: whether its memory is registered."""

    name = "uring"
    direct = True

    def __init__(self, path: str, options: QueueOptions, read_only: bool = False) -> None:
        if reason := why_unavailable():
            raise EngineUnavailable(f"engine uring: {reason[0]}; mend it with: {reason[1]}")
        super().__init__(path, options, read_only)

    def _open_backend(self) -> Any:
        from spdk_kv._native.engines.uring import UringBackend

        try:
            # Room for the depth, and for the wake-up and cancellations beside it.
            backend = UringBackend(self.fd, 2 * self.options.depth + 8)
        except OSError as refused:
            raise EngineUnavailable(f"engine uring: {refused}") from refused
        self.registered_buffers = backend.fixed_buffers
        return backend

    def _open_lone(self) -> Any:
        from spdk_kv._native.engines.uring import UringBackend

        try:
            return UringBackend(self.fd, LONE_ENTRIES, True)
        except OSError:  # RLIMIT_MEMLOCK may suffice for one ring alone
            return None

    def allocate(self, nbytes: int) -> Any:
        region = Region(nbytes, self.options.hugepages)
        registered = Registered(region)
        status = registered.add(self._backend.register, self._backend.unregister)
        if status == 0:
            return registered
        if self.registered_buffers:
            self.registered_buffers = False
            log.info(
                "%s: going on without registered buffers (%s); a higher RLIMIT_MEMLOCK saves "
                "CPU time, see `spdk-kv doctor`",
                self.where,
                errno.errorcode.get(status, status),
            )
        return region
