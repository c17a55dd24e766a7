"""Drops the pages of units that have left the page-cache path."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spdk_kv.engines import SharedPageCacheEngine
from spdk_kv.paths.copy import Copy
from spdk_kv.paths.units import Extents, TrackedUnit

log = logging.getLogger(__name__)


class Dropper:
    """Takes units out of ``cache``, or out of ``copy`` where the cache holds copies. ``lock``: the
    orchestrator's."""

    def __init__(
        self, cache: SharedPageCacheEngine, copy: Copy | None, lock: threading.RLock
    ) -> None:
        self._cache = cache
        self._copy = copy
        self._lock = lock
        self._thread = ThreadPoolExecutor(1, "spdk_kv-drop")

    def drop_later(self, unit: TrackedUnit) -> None:
        """Drops on a thread: 64 MiB of pages take milliseconds, and a read is waiting. Called with
        the lock held."""
        if self._copy is not None:
            self._later(self._copy.punch, self._copy.forget(unit))
        else:
            self._later(self._drop, unit)

    def leave_later(self, unit: TrackedUnit, extents: Extents) -> None:
        """Frees ``extents`` of the copy, which ``unit`` has none of its bytes in any more. Called
        with the lock held."""
        if self._copy is not None and unit.copyable:
            self._later(self._copy.punch, self._copy.leave(extents, unit.fill))

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            self._thread.submit(work, *arguments)
        except RuntimeError as refused:
            # The interpreter is exiting, and a store that nobody closed is closed now. Pages may
            # stay in the cache, and a copy ends with the process.
            log.debug("%s: nothing is dropped any more: %s", self._cache.where, refused)

    def drop_now(self, unit: TrackedUnit) -> None:
        """Drops the pages even if the unit has been promoted again; blocks until they are gone.
        Copies are left to :meth:`drop_later`."""
        if self._copy is None:
            self._drop(unit, even_if_cached=True)

    def _drop(self, unit: TrackedUnit, even_if_cached: bool = False) -> None:
        for offset, nbytes in unit.extents:
            if unit.cached and not even_if_cached:
                break  # promoted again in the meantime
            try:
                self._cache.drop(offset, nbytes)
            except OSError as refused:
                log.debug("%s: pages stay in the cache: %s", self._cache.where, refused)
        with self._lock:
            if unit.cached:
                # What reads brought in while its pages were dropped must not count as evicted.
                unit.reset_warmed(0)

    def close(self) -> None:
        """Blocks until everything accepted so far is dropped."""
        self._thread.shutdown()
