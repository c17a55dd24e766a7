"""Two paths behind one door: for each unit the page cache or the device, by the memory there is.

On a drive that the kernel keeps, both engines reach the same extents and the kernel keeps them
coherent, so a unit's path is no more than the choice of who reads it: promotion is reading through
the page cache, demotion is dropping it from there. On a drive that SPDK owns the page cache is that
of a file elsewhere, and promotion is copying there what was read (orchestrator_copy.py). Whatever
was decided, the bytes are the same.

Writes go directly, whatever path the reads take: a prefill through the page cache would push hot
units out of it, and wait for reclaim. Only a store told to use the page cache alone writes there,
and a decode step's few bytes, where they belong to units that are read from there: written
directly, the next step would have to read them back from the drive.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from spdk_kv.engines import CopyPageCacheEngine, Engine, SharedPageCacheEngine
from spdk_kv.errors import SpdkKvError
from spdk_kv.memory import MemoryReader, cached_nbytes
from spdk_kv.paths.copy import Copy
from spdk_kv.paths.dropping import Dropping
from spdk_kv.paths.units import Extents, TrackedUnit, UnitGroup
from spdk_kv.placement import StagingPool
from spdk_kv.residency import Observation, Policy
from spdk_kv.units import format_nbytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Of what the page cache is to hold: missed by so much, the next decision does not wait for the
# turn's end, since the rest of the turn would go on evicting.
_ALARM_SHARE = 0.05
# Of every extent, what one append writes through the page cache at most: more than a decode step
# has, and too little to push anything out.
_MOST_CACHED_WRITE_NBYTES = 256 << 10
# On its way into a copy at once: the memory is beside that of staging. What finds no room is copied
# at a later turn.
_MOST_COPYING_NBYTES = 32 << 20


class Watcher(Protocol):
    """Whoever wants to know that another decision holds."""

    def changed(self) -> None:
        """:meth:`Orchestrator.summary` has changed. Called with locks held: must not block."""

    def close(self) -> None:
        """It will not change any more."""


class Orchestrator:
    """The engines of a store, and which of them reads which unit. Thread-safe.

    ``direct``: the store's engine. ``cache``: the page cache of the same file, or of one apart for
    copies, or None where there is one path only; ``single`` then says why. ``ahead_nbytes``: memory
    of ``staging`` that may be used to read ahead.
    """

    def __init__(
        self,
        direct: Engine,
        cache: SharedPageCacheEngine | None,
        policy: Policy,
        memory: MemoryReader,
        single: str,
        staging: StagingPool,
        ahead_nbytes: int,
    ) -> None:
        self.direct = direct
        self.cache = cache
        self.policy = policy
        self.single = single
        self.writer: Engine = direct
        if cache is not None and not isinstance(cache, CopyPageCacheEngine):
            self.writer = cache if policy.name == "pagecache" else direct
        self.ahead_nbytes = ahead_nbytes
        self._staging = staging
        self._held_ahead_nbytes = 0
        self.admission = threading.Lock()
        """Held from :meth:`admits` to :meth:`hold_ahead`, so that no two take the same room."""
        self._memory = memory
        self._lock = threading.RLock()
        self.copy: Copy | None = None
        """What the page cache has of the units, where that is not of the drive's own bytes."""
        if isinstance(cache, CopyPageCacheEngine):
            self.copy = Copy(cache, self._lock, min(ahead_nbytes // 2, _MOST_COPYING_NBYTES))
        self._dropping = Dropping(cache, self.copy, self._lock) if cache is not None else None
        self._groups: dict[int, UnitGroup] = {}
        self._numbers = 0
        self._limit_nbytes = 0
        self._budget_nbytes = 0
        self._limited_by = ""
        self._reason = single or "nothing was decided yet"
        self._since = {"hit_nbytes": 0, "missed_nbytes": 0}
        self._counters = {
            "decisions": 0,
            "promotions": 0,
            "demotions": 0,
            "cached_read_nbytes": 0,
            "direct_read_nbytes": 0,
            "filled_nbytes": 0,
            "missed_nbytes": 0,
            "taken_over_nbytes": 0,
        }
        self._closed = False
        self._watcher: Watcher | None = None

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those of both paths, or of the one there is."""
        return (self.direct,) if self.cache is None else (self.direct, self.cache)

    # -- sequences come and go ------------------------------------------------------------------

    def adopt(self, name: str, extents: Sequence[Extents]) -> UnitGroup:
        """Takes up a sequence; ``extents``: those of K and V of each layer, in turn."""
        with self._lock:
            self._numbers += 1
            group = UnitGroup(self._numbers, name)
            group.add(extents)
            if self.copy is not None:
                for unit in group.units:
                    unit.filled = 0
            self._groups[group.number] = group
            self._changed()
            return group

    def release(self, group: UnitGroup) -> None:
        """Forgets a sequence that is gone; what the page cache holds of it is dropped."""
        with self._lock:
            if self._groups.pop(group.number, None) is not None:
                for unit in group.units:
                    self._demote(unit)
                self._changed()

    # -- writes ---------------------------------------------------------------------------------

    def writer_of(self, units: Sequence[TrackedUnit], nbytes: int) -> Engine:
        """The engine that is to write ``nbytes`` to every extent of ``units``, behind what is
        stored of them."""
        few = self.copy is None and nbytes <= _MOST_CACHED_WRITE_NBYTES
        cached = self.cache if few and all(unit.cached for unit in units) else None
        return cached or self.writer

    def was_written(self, units: Sequence[TrackedUnit], engine: Engine) -> None:
        """``engine`` wrote; of units that left its path meanwhile nothing is to stay there."""
        with self._lock:
            for unit in units if engine is not self.writer else ():
                if not unit.cached:
                    self._drop_aside(unit)

    # -- reads ----------------------------------------------------------------------------------

    def route(
        self, unit: TrackedUnit, start: int, end: int, ask: Callable[[Engine, int, int], None]
    ) -> None:
        """Has bytes ``[start, end)`` of the extents of ``unit`` read by the engines that do so now:
        ``ask(engine, start, end)`` begins a part."""
        with self._lock:  # the unit must not leave its path in between
            turn = start
            if unit.cached and self.cache is not None:
                turn = min(max(start, unit.filled), end)
            if start < turn and self.cache is not None:
                ask(self.cache, start, turn)
            if turn < end:
                ask(self.direct, turn, end)

    def brings_in(self, units: Sequence[TrackedUnit]) -> bool:
        """Whether reads of all ``units`` bring them into the page cache."""
        return self.copy is None and all(unit.cached for unit in units)

    def other(self, engine: Engine, unit: TrackedUnit | None, end: int) -> Engine | None:
        """The engine of the other path, if it has the first ``end`` bytes of the extents, too;
        ``unit``: whose those are, if it is on the page-cache path."""
        if engine is not self.direct:
            return self.direct
        if self.copy is not None and (unit is None or unit.filled < end):
            return None
        return self.cache

    def resized(self, unit: TrackedUnit, nbytes: int) -> None:
        """The device has the first ``nbytes`` of every extent of ``unit`` now."""
        with self._lock:
            unit.resize(nbytes)

    def was_delivered(
        self, unit: TrackedUnit, start: int, lines: Callable[[], torch.Tensor], chunk_nbytes: int
    ) -> None:
        """The device delivered the bytes of a unit on the page-cache path from ``start`` on; see
        :meth:`Copy.fill`."""
        if self.copy is not None and unit.cached:
            self.copy.fill(unit, start, lines(), chunk_nbytes)

    def reads(self, group: UnitGroup, layer: int | None) -> None:
        """A layer is about to be read on demand (None: one is read ahead); may decide anew. Does no
        I/O but for a few small files of procfs.

        What is read ahead for the next turn goes as this one decided: a budget is no older than a
        turn then. Only the first turn would have decided nothing yet.
        """
        if self.cache is None:
            return
        # Of either path: the one that just now reads nothing must not keep what was dropped on it.
        self._collect()
        with self._lock:
            if not (group.begins_ahead() if layer is None else group.begins_turn(layer)):
                return
            # Once for all sequences that take turns, not once for each.
            if group.turned or not any(other.turned for other in self._groups.values()):
                for other in self._groups.values():
                    other.turned = False
                    other.idle_steps += 1
                self.decide()
            group.turned = True
            group.idle_steps = 0

    def was_read(self, unit: TrackedUnit | None, nbytes: int, cold_nbytes: int, looks: int) -> None:
        """Counts a finished read: of ``unit`` through the page cache, or (None) a direct one.
        ``looks``: the unit's, when the read began."""
        with self._lock:
            if unit is None:
                self._counters["direct_read_nbytes"] += nbytes
                return
            missed = unit.warm(cold_nbytes, looks) if unit.cached else 0
            self._counters["cached_read_nbytes"] += nbytes
            self._counters["filled_nbytes"] += cold_nbytes - missed
            self._counters["missed_nbytes"] += missed
            self._since["hit_nbytes"] += nbytes - cold_nbytes
            self._since["missed_nbytes"] += missed
            if not unit.cached and self.copy is None:
                self._drop_aside(unit)  # what was read ahead came after the drop
            if missed and self._since["missed_nbytes"] > _ALARM_SHARE * self._limit_nbytes:
                self.decide()

    def took_over(self, unit: TrackedUnit | None, nbytes: int, failure: SpdkKvError) -> None:
        """Counts bytes that one path could not deliver and the other one did. If it was the page
        cache (of ``unit``) that could not, what it holds is dropped, or every read would pay."""
        with self._lock:
            self._counters["taken_over_nbytes"] += nbytes
            if unit is not None:
                self._demote(unit)
                if self.copy is not None:
                    self.copy.failed(failure)
        if unit is not None and self._dropping is not None:
            # At once: promoted again before they go, the pages would be read as they are.
            self._dropping.now(unit)

    # -- reading ahead --------------------------------------------------------------------------

    def admits(self, nbytes: int) -> bool:
        """Whether so much more may be read ahead now. The first always may, however large.

        A read on demand overtakes what is read ahead within each engine, so that it waits for no
        more than the commands in flight.
        """
        held = self._held_ahead_nbytes
        return held == 0 or held + nbytes <= self.ahead_nbytes

    def hold_ahead(self, nbytes: int) -> None:
        """Counts memory taken (or, negative, given back) by what is read ahead."""
        with self._lock:
            self._held_ahead_nbytes += nbytes

    # -- decisions ------------------------------------------------------------------------------

    def decide(self) -> None:
        """Reads the budget, asks the policy, and moves units between the paths."""
        with self._lock:
            if self._closed:
                return
            self._staging.shed()
            if self.copy is not None:
                self.copy.turn()
            budget = self._memory.read()
            seen = Observation(
                budget_nbytes=budget.nbytes,
                pressure=budget.pressure or 0.0,
                resident_nbytes=self._resident() if self._since["missed_nbytes"] else None,
                **self._since,
            )
            self._since = {"hit_nbytes": 0, "missed_nbytes": 0}
            tracked: dict[Hashable, TrackedUnit] = {
                unit.key: unit for group in self._groups.values() for unit in group.units
            }
            cached = frozenset(key for key, unit in tracked.items() if unit.cached)
            decision = self.policy.decide(
                [unit.numbers() for unit in tracked.values()], cached, seen
            )
            self._counters["decisions"] += 1
            before = (cached, self._limit_nbytes, self._limited_by)
            if before != (decision.cached, decision.limit_nbytes, budget.limited_by):
                self._changed()
            self._budget_nbytes, self._limited_by = budget.nbytes, budget.limited_by
            self._limit_nbytes, self._reason = decision.limit_nbytes, decision.reason
            for key in cached - decision.cached:
                self._demote(tracked[key])
            for key in decision.cached - cached:
                tracked[key].cached = True
                self._counters["promotions"] += 1
        if decision.cached != cached:
            log.info(
                "%s: %d of %d units through the page cache (%d before): %s",
                self.direct.where,
                len(decision.cached),
                len(tracked),
                len(cached),
                decision.reason,
            )

    def _resident(self) -> int | None:
        """Bytes of the units on the page-cache path that the kernel really has in memory."""
        if self.cache is None:
            return None
        total = 0
        for group in self._groups.values():
            for unit in group.units:
                if not unit.cached:
                    continue
                each = unit.served_nbytes // len(unit.extents)
                found = [cached_nbytes(self.cache.fd, offset, each) for offset, _ in unit.extents]
                known = [nbytes for nbytes in found if nbytes is not None]
                if len(known) < len(found):
                    return None
                # What has to come back is not missed a second time.
                unit.warmed_nbytes = sum(known)
                unit.looks += 1
                total += unit.warmed_nbytes
        return total

    def _demote(self, unit: TrackedUnit) -> None:
        if not unit.cached:
            return
        unit.cached, unit.warmed_nbytes = False, 0
        self._counters["demotions"] += 1
        self._drop_aside(unit)

    def _drop_aside(self, unit: TrackedUnit) -> None:
        if self._dropping is not None and not self._closed:
            self._dropping.aside(unit)

    # -- what it did, and why -------------------------------------------------------------------

    def _collect(self) -> None:
        self.direct.queue.collect()
        if self.cache is not None:
            self.cache.queue.collect()

    def stats(self) -> dict[str, Any]:
        """Policy, budget, what was decided last and why, and bytes by path since the opening."""
        self._collect()
        with self._lock:
            return self._stats()

    def _stats(self) -> dict[str, Any]:
        units = [unit for group in self._groups.values() for unit in group.units]
        cached = [unit for unit in units if unit.cached]
        return {
            "policy": self.policy.name,
            "paths": 1 if self.cache is None else 2,
            **(self.copy.stats(cached) if self.copy else {"page_cache_dir": None}),
            "reason": self._reason,
            "budget_nbytes": self._budget_nbytes,
            "limited_by": self._limited_by,
            "limit_nbytes": self._limit_nbytes,
            "units": len(units),
            "cached_units": len(cached),
            "cached_nbytes": sum(unit.nbytes for unit in cached),
            **self._counters,
        }

    def summary(self) -> dict[str, Any]:
        """As :meth:`stats`, and of each sequence how many units of K and of V are on which path."""
        with self._lock:
            groups = [group.summary() for group in self._groups.values()]
            return {"engine": self.direct.name, **self._stats(), "sequences": groups}

    def watch(self, watcher: Watcher) -> None:
        """From now on ``watcher`` is told of changes; :meth:`close` closes it."""
        self._watcher = watcher

    def _changed(self) -> None:
        if self._watcher is not None and not self._closed:
            self._watcher.changed()

    def why(self) -> list[dict[str, Any]]:
        """Of each unit: the sequence, layer, K or V, bytes, the path, and why it is on it."""
        with self._lock:
            return [
                {
                    "sequence": group.name,
                    "layer": unit.layer,
                    "part": "v" if unit.value else "k",
                    "nbytes": unit.nbytes,
                    "path": "page cache" if unit.cached and unit.filled else self.direct.name,
                    "why": (self.single or self.policy.why(unit.numbers()))
                    + (self.copy.lacks(unit) if self.copy else ""),
                }
                for group in self._groups.values()
                for unit in group.units
            ]

    def close(self) -> None:
        """Ends the second path; the direct engine is its owner's to close."""
        log.debug("%s: %s", self.direct.where, _account(self._counters))
        with self._lock:
            self._closed = True
            if self.copy is not None:
                self.copy.close()
        if self._watcher is not None:
            self._watcher.close()
        if self._dropping is not None:
            self._dropping.close()
        if self.cache is not None:
            self.cache.close()
        self._memory.close()


def _account(counters: dict[str, int]) -> str:
    """One line on what was read by which path."""
    return (
        f"{format_nbytes(counters['cached_read_nbytes'])} read through the page cache "
        f"({format_nbytes(counters['missed_nbytes'])} of it missed), "
        f"{format_nbytes(counters['direct_read_nbytes'])} directly"
    )
