"""SPDK's environment in this process: set up once, on the first use, and kept until the end."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from spdk_kv.errors import ClosedError, EngineUnavailable

log = logging.getLogger(__name__)
spdk_log = logging.getLogger("spdk_kv.spdk")

# SPDK's levels (include/spdk/log.h): error, warning, notice, info, debug.
_LEVELS = {
    "0": logging.ERROR,
    "1": logging.WARNING,
    "2": logging.INFO,
    "3": logging.DEBUG,
    "4": logging.DEBUG,
}
_LEAST_HUGEPAGE_NBYTES = 128 << 20
_INSTALL = (
    "install SPDK's shared libraries (docs/how-to/spare-drive-for-spdk.md), then reinstall spdk_kv"
)


@dataclass(frozen=True)
class SpdkSettings:
    """How SPDK is set up; see :func:`configure`.

    ``core``: the CPU that SPDK's set-up thread counts as its own (None: the last that this process
    may use); nothing is pinned to it. ``hugepages``: None uses reserved ones where enough are
    free. ``memory_nbytes``: DMA memory without hugepages, taken at once.
    """

    core: int | None = None
    hugepages: bool | None = None
    memory_nbytes: int = 512 << 20


_lock = threading.Lock()
_settings = SpdkSettings()
_bindings: ModuleType | None = None
_pid = 0


def configure(settings: SpdkSettings) -> None:
    """Chooses the settings. EngineUnavailable once the environment is set up: it cannot change."""
    global _settings
    with _lock:
        if _bindings is not None and settings != _settings:
            raise EngineUnavailable("SPDK is set up already; configure it before the first use")
        _settings = settings


def settings() -> SpdkSettings:
    """The settings that are, or will be, used."""
    return _settings


def why_unavailable() -> tuple[str, str] | None:
    """(what is missing, what mends it), or None where SPDK's bindings are there.

    Does not load SPDK: that would take over a signal handler.
    """
    from importlib.util import find_spec

    if find_spec("spdk_kv._native.spdk") is None:
        return "built without SPDK", _INSTALL
    return None


def bindings() -> ModuleType:
    """The compiled bindings, with the environment set up. Blocks for up to seconds the first time.

    EngineUnavailable where SPDK or the memory it needs is missing; ClosedError after a fork.
    """
    global _bindings, _pid
    with _lock:
        if _bindings is None:
            _bindings = _set_up(_settings)
            _pid = os.getpid()
        if os.getpid() != _pid:
            raise ClosedError(
                f"SPDK was set up by process {_pid} and cannot be used after a fork: use `spawn`"
            )
        return _bindings


def _set_up(settings: SpdkSettings) -> ModuleType:
    if missing := why_unavailable():
        raise EngineUnavailable(f"engine spdk: {missing[0]}; {missing[1]}")
    before = _signal_action(signal.SIGBUS)
    try:
        from spdk_kv._native import spdk
    except ImportError as broken:
        raise EngineUnavailable(f"engine spdk: {broken}; {_INSTALL}") from broken
    spdk.chain_sigbus(before)
    if not spdk.transport_available("PCIE"):
        raise EngineUnavailable(
            "engine spdk: the bindings were linked without SPDK's transports (their constructors "
            "were dropped); reinstall spdk_kv against SPDK's shared libraries"
        )
    hugepages, free_nbytes = settings.hugepages, _free_hugepage_nbytes()
    if hugepages is None:
        hugepages = free_nbytes >= _LEAST_HUGEPAGE_NBYTES
    elif hugepages and not free_nbytes:
        raise EngineUnavailable(
            "engine spdk: hugepages were requested and none is free; at least "
            f"{_LEAST_HUGEPAGE_NBYTES >> 20} MiB are needed: `spdk-kv doctor` has the command"
        )
    core = settings.core if settings.core is not None else max(os.sched_getaffinity(0))
    reader, writer = os.pipe()
    threading.Thread(target=_relay, args=(reader,), name="spdk_kv-log", daemon=True).start()
    status = spdk.set_up_environment(
        f"[{core}]",
        memory_mib=-1 if hugepages else settings.memory_nbytes >> 20,
        hugepages=hugepages,
        # Nameless memory: nothing of it is left in a file system when the process is killed.
        arguments="--in-memory" if hugepages else "",
        pci=True,
        log_fd=writer,
    )
    if status:
        reason = errno.errorcode.get(-status, str(status))
        raise EngineUnavailable(
            f"engine spdk: its environment could not be set up ({reason}); look at the log of "
            "spdk_kv.spdk, and at hugepages and memlock in `spdk-kv doctor`"
        )
    log.info("%s, %s", spdk.SPDK_VERSION, "hugepages" if hugepages else "no hugepages")
    return spdk


def _signal_action(number: int) -> bytes:
    """The process's ``struct sigaction`` for a signal."""
    action = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).sigaction(int(number), None, action)
    return bytes(action)


def _free_hugepage_nbytes() -> int:
    """What is free and not promised to another process."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Huge"):
            found[name] = int(value.split()[0])
    free = found.get("HugePages_Free", 0) - found.get("HugePages_Rsvd", 0)
    return free * (found.get("Hugepagesize", 0) << 10)


def _relay(reader: int) -> None:
    """Hands SPDK's and DPDK's lines to Python's logging, from a thread of its own: the library's
    threads must not wait for the GIL."""
    with open(reader, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            level, _, text = line.rstrip().partition(" ")
            if level in _LEVELS:
                spdk_log.log(_LEVELS[level], "%s", text)
            elif line.strip():
                spdk_log.info("%s", line.strip())
