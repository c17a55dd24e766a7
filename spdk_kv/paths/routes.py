"""Which engine serves which bytes of a unit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from spdk_kv.engines import Engine, SharedPageCacheEngine
from spdk_kv.memory import cached_nbytes
from spdk_kv.paths.copy import Copy
from spdk_kv.paths.units import TrackedUnit

# Most bytes per extent that one append writes through the page cache. Chosen, not measured: more
# than a decode step appends, and too little to push anything out.
_MAX_CACHED_WRITE_NBYTES = 256 << 10


class Routes:
    """The engines of both paths, chosen by the path that each unit is on. Thread-safe.

    ``direct``: the store's engine. ``cache``: the page cache's, None where there is one path only.
    ``copy``: what the cache holds of the units, None where it is the cache of the drive's own
    bytes. ``writes_cached``: whether all writes go through the cache; they cannot go to copies.
    ``lock``: the orchestrator's.
    """

    def __init__(
        self,
        direct: Engine,
        cache: SharedPageCacheEngine | None,
        copy: Copy | None,
        writes_cached: bool,
        lock: threading.RLock,
    ) -> None:
        self.direct = direct
        self.cache = cache
        self.copy = copy
        self.writer: Engine = direct
        """Serves writes, except the few bytes for which :meth:`writer_of` chooses the cache."""
        if cache is not None and copy is None and writes_cached:
            self.writer = cache
        self._lock = lock

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines of both paths, or the only one."""
        return (self.direct,) if self.cache is None else (self.direct, self.cache)

    def collect(self) -> None:
        """Collects what has completed on both paths, so that neither keeps what was dropped on it
        while no reads arrive there. Does not block."""
        for engine in self.engines:
            engine.queue.collect()

    def writer_of(self, units: Sequence[TrackedUnit], nbytes: int) -> Engine:
        """The engine that is to append ``nbytes`` to every extent of ``units``."""
        is_small = self.copy is None and nbytes <= _MAX_CACHED_WRITE_NBYTES
        cache = self.cache if is_small and all(unit.cached for unit in units) else None
        return cache or self.writer

    def route(
        self, unit: TrackedUnit, start: int, end: int, read: Callable[[Engine, int, int], None]
    ) -> None:
        """Splits bytes ``[start, end)`` of the extents of ``unit`` by the engines that serve them
        now. ``read(engine, start, end)`` is called for each part and must only start it."""
        with self._lock:  # the unit must not leave its path in between
            border = start
            if unit.cached and self.cache is not None:
                border = min(max(start, unit.filled), end)
            if start < border and self.cache is not None:
                read(self.cache, start, border)
            if border < end:
                read(self.direct, border, end)

    def reads_fill_cache(self, units: Sequence[TrackedUnit]) -> bool:
        """Whether reading ``units`` brings all of them into the page cache."""
        return self.copy is None and all(unit.cached for unit in units)

    def fallback(self, engine: Engine, unit: TrackedUnit | None, end: int) -> Engine | None:
        """The engine of the other path, or None if it does not have the first ``end`` bytes of the
        extents. ``unit``: their owner if it is on the page-cache path."""
        if engine is not self.direct:
            return self.direct
        if self.copy is not None and (unit is None or unit.filled < end):
            return None
        return self.cache

    def measure_resident(self, units: Iterable[TrackedUnit]) -> int | None:
        """Bytes of ``units`` that the kernel has in its page cache, None where that is unknown.
        What is found missing is not counted as missed again when it is read."""
        if self.cache is None:
            return None
        total = 0
        for unit in units:
            each = unit.served_nbytes // unit.count
            found = [cached_nbytes(self.cache.fd, *place) for place in unit.ranges(0, each)]
            known = [nbytes for nbytes in found if nbytes is not None]
            if len(known) < len(found):
                return None
            unit.reset_warmed(sum(known))
            total += unit.warmed_nbytes
        return total
