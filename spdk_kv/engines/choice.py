"""Which engine serves a location on this machine, and why it is not a better one."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from spdk_kv.engines import ng, uring
from spdk_kv.engines.base import Engine, QueueOptions
from spdk_kv.engines.location import Location
from spdk_kv.engines.memory import NullEngine, RamEngine
from spdk_kv.engines.pagecache.engine import PageCacheEngine
from spdk_kv.engines.spdk import environment as spdk_environment
from spdk_kv.engines.threads import ThreadsEngine
from spdk_kv.engines.uring import UringEngine
from spdk_kv.errors import EngineUnavailable

log = logging.getLogger(__name__)

_FILE_ENGINES = {"uring": UringEngine, "threads": ThreadsEngine, "pagecache": PageCacheEngine}
_logged: set[str] = set()


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine can run here; ``reason`` and ``remedy`` where it cannot."""

    name: str
    available: bool
    reason: str
    remedy: str


def engine_status() -> list[EngineStatus]:
    """Every engine of this build, and whether it can run on this machine."""
    missing = uring.why_unavailable()
    found = [EngineStatus("uring", missing is None, *(missing or ("", "")))]
    missing = ng.why_unavailable()
    found.append(EngineStatus("ng", missing is None, *(missing or ("", ""))))
    missing = spdk_environment.why_unavailable()
    found.append(EngineStatus("spdk", missing is None, *(missing or ("", ""))))
    found += [EngineStatus(name, True, "", "") for name in ("threads", "pagecache", "ram", "null")]
    return found


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.warning("%s", message)


def open_engine(
    location: Location,
    path: str = "",
    *,
    engine: str | None = None,
    capacity_nbytes: int = 0,
    options: QueueOptions | None = None,
    read_only: bool = False,
) -> Engine:
    """Opens the engine for ``location``.

    ``path``: the data file of a ``file://`` location (a block device is its own). ``engine``:
    uring, threads or pagecache; None takes the best that may be used here and logs, once, why it
    is not a better one. ``capacity_nbytes``: the size of ``ram://``. ``read_only``: beside others
    that have it open, which only files and block devices allow. Raises EngineUnavailable,
    ValueError, DeviceError.
    """
    options = options or QueueOptions()
    if read_only:
        refuse_one_process(location)
    if options.queue_pairs > 1 and not location.is_nvme:
        raise ValueError(f"queue_pairs is for the engine spdk; {location} has one queue")
    if location.scheme in ("ram", "null"):
        if engine not in (None, location.scheme):
            raise ValueError(f"{location} is served by the engine {location.scheme} alone")
        if location.scheme == "null":
            return NullEngine(options)
        return RamEngine(capacity_nbytes, options)
    if location.is_nvme:
        if engine not in (None, "spdk"):
            raise ValueError(f"{location} is served by the engine spdk alone")
        from spdk_kv.engines.spdk.engine import SpdkEngine

        return SpdkEngine(location, options)
    if location.scheme == "ng":
        if engine not in (None, "ng"):
            raise ValueError(f"{location} is served by the engine ng alone")
        return ng.NgEngine(location.path, options)
    path = path or location.path
    if engine is not None:
        if engine not in _FILE_ENGINES:
            raise ValueError(
                f"engine {engine!r} does not serve {location}; it is one of "
                f"{', '.join(_FILE_ENGINES)}"
            )
        return _FILE_ENGINES[engine](path, options, read_only)
    refusals = []
    if missing := uring.why_unavailable():
        refusals.append(missing[0])
    for kind in (UringEngine, ThreadsEngine) if not missing else (ThreadsEngine,):
        try:
            opened: Engine = kind(path, options, read_only)
        except EngineUnavailable as unavailable:
            refusals.append(str(unavailable))
            continue
        break
    else:
        opened = PageCacheEngine(path, options, read_only)
    if refusals:
        _log_once(f"engine {opened.name} serves {location}: {refusals[-1]}")
    return opened


def refuse_one_process(location: Location) -> None:
    """Raises where only one process at a time reaches ``location``, so that nobody can read it
    beside its owner: ValueError for memory, EngineUnavailable for a drive."""
    if location.scheme in ("ram", "null"):
        raise ValueError(f"{location} is its own process's alone: there is nothing to read there")
    if location.scheme not in ("file", "block"):
        engine = "spdk" if location.is_nvme else location.scheme
        raise EngineUnavailable(
            f"{location} cannot be opened read_only: the engine {engine} gives its drive to one "
            "process at a time, which is the one that writes. Read in that process, or keep what "
            "several processes read in a store at file:// or block://"
        )
