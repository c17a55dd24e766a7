"""What leaves the page-cache path leaves memory, too."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from spdk_kv.engines import SharedPageCacheEngine
from spdk_kv.paths.copy import Copy
from spdk_kv.paths.units import TrackedUnit

log = logging.getLogger(__name__)


class Dropping:
    """Takes units out of ``cache``, or out of the ``copy`` that it has of them. ``lock``: the
    orchestrator's."""

    def __init__(
        self, cache: SharedPageCacheEngine, copy: Copy | None, lock: threading.RLock
    ) -> None:
        self._cache = cache
        self._copy = copy
        self._lock = lock
        self._thread = ThreadPoolExecutor(1, "spdk_kv-drop")

    def aside(self, unit: TrackedUnit) -> None:
        """On a thread: dropping the pages of 64 MiB takes milliseconds, and a read is waiting.
        Called with the lock held."""
        if self._copy is not None:
            self._thread.submit(self._copy.punch, self._copy.forget(unit))
        else:
            self._thread.submit(self._drop, unit)

    def now(self, unit: TrackedUnit) -> None:
        """The pages, and even if the unit is on that path again. Blocks for that."""
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
                # What reads brought in while it went is not missed when it is gone.
                unit.warmed_nbytes = 0
                unit.looks += 1

    def close(self) -> None:
        """Blocks until what was begun is over."""
        self._thread.shutdown()
