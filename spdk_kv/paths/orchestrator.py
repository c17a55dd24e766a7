"""Two paths behind one door: each unit is read through the page cache or directly.

Where the kernel's page cache reaches the drive's bytes, both engines reach the same extents and the
kernel keeps them coherent. A unit's path is then only the choice of who reads it: promotion is
reading through the page cache, demotion is dropping the unit's pages. On a drive that the page
cache does not reach, such as one that SPDK owns, the page cache holds copies in a file elsewhere,
and promotion is copying there what was read (copy.py). Either way the bytes read are the same.

Writes go directly, whatever path the reads take: a prefill through the page cache would push hot
units out of it and wait for reclaim. There are two exceptions: a store that may use only the page
cache, and the few bytes that a decode step appends to units on the page-cache path, which the next
step would otherwise have to read back from the drive.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from heapq import nlargest
from typing import TYPE_CHECKING, Any, Protocol

from spdk_kv.engines import CopyPageCacheEngine, Engine, SharedPageCacheEngine
from spdk_kv.errors import SpdkKvError
from spdk_kv.memory import MemoryReader
from spdk_kv.paths.accounting import Accounting
from spdk_kv.paths.admission import ReadAheadAdmission
from spdk_kv.paths.backlog import Backlog
from spdk_kv.paths.copy import Copy
from spdk_kv.paths.dropping import Dropper
from spdk_kv.paths.routes import Routes
from spdk_kv.paths.scans import Scans
from spdk_kv.paths.units import TrackedUnit, UnitGroup
from spdk_kv.placement import Ground, StagingPool
from spdk_kv.residency import Observation, Policy

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Memory for what is being copied at once, besides staging. Chosen: two layers of 16 MiB. What finds
# no room is copied during a later scan.
_MAX_COPYING_NBYTES = 32 << 20


class Watcher(Protocol):
    """Is notified of decisions."""

    def changed(self) -> None:
        """:meth:`Orchestrator.summary` has changed. Called with locks held, so must not block."""

    def close(self) -> None:
        """It will not change any more."""


class Orchestrator:
    """Decides which units are on which path, between the scans of the sequences. Thread-safe.

    ``routes`` holds the engines and chooses between them; ``ahead`` admits what is read ahead, and
    ``backlog`` what is to be written.

    Args:
        direct: the store's engine; its owner closes it.
        cache: the page cache of the same bytes, or of copies; None where there is one path only.
        policy: decides which units belong in the page cache.
        memory: reads how much memory there is; closed with the orchestrator.
        single_path_reason: why there is one path only; empty where there are two.
        staging: the store's staging pool, which sheds unused memory at each decision.
        ahead_nbytes: memory of ``staging`` that may be used to read ahead.
    """

    def __init__(
        self,
        direct: Engine,
        cache: SharedPageCacheEngine | None,
        policy: Policy,
        memory: MemoryReader,
        single_path_reason: str,
        staging: StagingPool,
        ahead_nbytes: int,
    ) -> None:
        self._lock = threading.RLock()
        copy = None
        if isinstance(cache, CopyPageCacheEngine):
            copy = Copy(cache, self._lock, min(ahead_nbytes // 2, _MAX_COPYING_NBYTES))
        self.routes = Routes(direct, cache, copy, policy.name == "pagecache", self._lock)
        self.ahead = ReadAheadAdmission(ahead_nbytes)
        self.backlog = Backlog()
        self._scans = Scans(sleeps=not getattr(policy, "binds_for_good", False))
        self._accounting = Accounting(policy, self.routes, single_path_reason)
        self._dropper = Dropper(cache, copy, self._lock) if cache is not None else None
        self._policy = policy
        self._memory = memory
        self._staging = staging
        self._watcher: Watcher | None = None
        self._closed = False
        self._uses = 0

    # -- sequences come and go ------------------------------------------------------------------

    def adopt(
        self, name: str, layers: Sequence[Sequence[tuple[Ground, int]]], copyable: bool = True
    ) -> UnitGroup:
        """Starts to track a sequence.

        Args:
            name: for people.
            layers: of each layer's units, K and then V, the ground and the number of extents.
            copyable: whether there may be copies of them; not of a sequence on shared ground.

        Returns:
            Its units. All are read directly until the next decision.
        """
        with self._lock:
            group = self._scans.add(name, layers, copyable)
            if self.routes.copy is not None:
                for unit in group.units:
                    unit.filled = 0
            self._notify()
            return group

    def release(self, group: UnitGroup) -> None:
        """Forgets a deleted or closed sequence, and drops what the page cache holds of it. With the
        last one goes the staging memory that nobody uses."""
        with self._lock:
            if self._scans.remove(group):
                for unit in group.units:
                    self._demote(unit)
                self._notify()
            is_last = self._scans.is_empty
        if is_last:
            self._staging.trim()

    def move(self, unit: TrackedUnit, ground: Ground) -> None:
        """Bytes of ``unit`` that are still to come will lie on another ``ground``."""
        with self._lock:
            left = {offset for offset, _ in unit.extents}
            before, unit.ground = unit.extents, ground
            left -= {offset for offset, _ in unit.extents}
            if self.routes.copy is not None and self._dropper is not None and left:
                self._dropper.leave_later(unit, tuple(each for each in before if each[0] in left))

    def resize(self, unit: TrackedUnit, nbytes: int) -> None:
        """The drive has the first ``nbytes`` of every extent of ``unit`` now."""
        with self._lock:
            self._scans.wake(unit.group)
            unit.resize(nbytes)

    # -- reads and writes -----------------------------------------------------------------------

    def before_read(self, group: UnitGroup, layer: int) -> None:
        """Decides anew if reading ``layer`` starts another scan. Its only I/O is on procfs."""
        self._before_read(group, layer)

    def before_read_ahead(self, group: UnitGroup) -> None:
        """Decides if nothing was decided before. Everything else that is read ahead goes by the
        decision of the present scan, so a decision is never older than one scan."""
        self._before_read(group, None)

    def _before_read(self, group: UnitGroup, layer: int | None) -> None:
        has_two = self.routes.cache is not None
        if has_two:
            self.routes.collect()
        with self._lock:
            self._scans.wake(group)
            if not (group.enter_ahead() if layer is None else group.enter_layer(layer)):
                return
            if self._scans.is_decision_due(group):
                if has_two:
                    self.decide()
                else:
                    # With one path there is nothing to decide, but a cache that grows leaves one
                    # size of buffers after the other behind.
                    self._staging.shed()
            self._scans.mark_scanned(group)

    def record_read(
        self,
        group: UnitGroup,
        unit: TrackedUnit | None,
        nbytes: int,
        cold_nbytes: int,
        warm_epoch: int,
    ) -> None:
        """Counts a finished read; decides anew if too much was evicted.

        Args:
            group: the sequence that was read.
            unit: what was read through the page cache, None for a direct read.
            nbytes: bytes read.
            cold_nbytes: the part of them that was not in the page cache.
            warm_epoch: the unit's when the read began.
        """
        with self._lock:
            group.read_nbytes += nbytes
            self._use(group)
            if unit is None:
                self._accounting.count_direct(nbytes)
                return
            missed = unit.record_cold_read(cold_nbytes, warm_epoch) if unit.cached else 0
            self._accounting.count_cached(nbytes, cold_nbytes, missed)
            if not unit.cached and self.routes.copy is None:
                self._drop_later(unit)  # a read ahead brought pages back after the drop
            if missed and self._accounting.is_alarming:
                self.decide()

    def record_takeover(self, unit: TrackedUnit | None, nbytes: int, failure: SpdkKvError) -> None:
        """Counts bytes that one path failed to deliver and the other one did.

        Args:
            unit: whose bytes the page cache failed to deliver; None if the direct path failed. The
                unit is demoted and its pages dropped, or every read would fail first. Blocks for
                that.
            nbytes: bytes that were taken over.
            failure: of the path that failed.
        """
        with self._lock:
            self._accounting.count_takeover(nbytes)
            if unit is not None:
                self._demote(unit)
                if self.routes.copy is not None:
                    self.routes.copy.pause(failure)
        if unit is not None and self._dropper is not None:
            # Not later: promoted again before that, the damaged pages would be read.
            self._dropper.drop_now(unit)

    def fill_copy(
        self, unit: TrackedUnit, start: int, lines: Callable[[], torch.Tensor], chunk_nbytes: int
    ) -> None:
        """Copies what was read directly of a unit on the page-cache path, from byte ``start`` of
        its extents on; see :meth:`Copy.fill`. Does nothing where there are no copies."""
        if self.routes.copy is not None and unit.cached:
            self.routes.copy.fill(unit, start, lines(), chunk_nbytes)

    def after_write(self, units: Sequence[TrackedUnit], engine: Engine, nbytes: int) -> None:
        """``engine`` wrote ``nbytes`` to ``units`` of one sequence; drops the pages of those that
        left its path meanwhile."""
        with self._lock:
            units[0].group.written_nbytes += nbytes
            self._use(units[0].group)
            for unit in units if engine is not self.routes.writer else ():
                if not unit.cached:
                    self._drop_later(unit)

    def _use(self, group: UnitGroup) -> None:
        self._uses += 1
        group.used = self._uses

    # -- decisions ------------------------------------------------------------------------------

    def decide(self) -> None:
        """Reads how much memory there is, asks the policy, and moves units between the paths."""
        with self._lock:
            if self._closed:
                return
            self._staging.shed()
            if self.routes.copy is not None:
                self.routes.copy.before_decision()
            tracked: dict[Hashable, TrackedUnit] = {unit.key: unit for unit in self._scans.units()}
            units = [unit.for_policy() for unit in tracked.values()]
            before = {key for key, unit in tracked.items() if unit.cached}
            sleeper = self._scans.sleeper()
            if sleeper is not None:
                units.append(sleeper)
                before.add(sleeper.key)
            cached = frozenset(before)
            available = self._memory.read()
            resident = None
            if self._accounting.has_recent_misses:
                everything = (unit for group in self._scans.groups for unit in group.units)
                resident = self.routes.measure_resident(u for u in everything if u.cached)
            hit, missed = self._accounting.take_recent()
            seen = Observation(
                available_nbytes=available.nbytes,
                pressure=available.pressure or 0.0,
                resident_nbytes=resident,
                hit_nbytes=hit,
                missed_nbytes=missed,
            )
            decision = self._policy.decide(units, cached, seen)
            has_moved = self._accounting.record_decision(decision, available)
            if has_moved or decision.cached != cached:
                self._notify()
            for key in cached - decision.cached:
                if key in tracked:
                    self._demote(tracked[key])
            if sleeper is not None and sleeper.key not in decision.cached:
                chosen = sum(u.planned_nbytes for u in units if u.key in decision.cached)
                for unit in self._scans.displaced(max(0, decision.budget_nbytes - chosen)):
                    self._demote(unit)
            for key in decision.cached - cached:
                tracked[key].cached = True
                self._accounting.count_promotion()
        if decision.cached != cached:
            log.info(
                "%s: %d of %d units through the page cache (%d before): %s",
                self.routes.direct.where,
                len(decision.cached),
                len(tracked),
                len(cached),
                decision.reason,
            )

    def _demote(self, unit: TrackedUnit) -> None:
        if not unit.cached:
            return
        unit.cached, unit.warmed_nbytes = False, 0
        self._accounting.count_demotion()
        self._drop_later(unit)

    def _drop_later(self, unit: TrackedUnit) -> None:
        if self._dropper is not None and not self._closed:
            self._dropper.drop_later(unit)

    # -- what it did, and why -------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Policy, memory, the last decision and its reason, and bytes by path since the opening."""
        self.routes.collect()
        with self._lock:
            return self._accounting.stats(self._scans.groups)

    def summary(self) -> dict[str, Any]:
        """As :meth:`stats`, and for each sequence how many units of K and of V are on which
        path."""
        with self._lock:
            groups = self._scans.groups
            stats = self._accounting.stats(groups)
            sequences = [group.summary() for group in groups]
            return {"engine": self.routes.direct.name, **stats, "sequences": sequences}

    def traffic(self, most: int) -> list[dict[str, Any]]:
        """Of each of the ``most`` sequences that were read or written last: units, and bytes."""
        with self._lock:
            groups = nlargest(most, self._scans.groups, key=lambda group: group.used)
            return [group.traffic() for group in groups]

    def why(self) -> list[dict[str, Any]]:
        """An entry per unit: sequence, layer, K or V, bytes, its path, and the reason for that."""
        with self._lock:
            return self._accounting.why(self._scans.groups, self._scans.is_asleep)

    def watch(self, watcher: Watcher) -> None:
        """Notifies ``watcher`` of changes from now on; :meth:`close` closes it."""
        self._watcher = watcher

    def _notify(self) -> None:
        if self._watcher is not None and not self._closed:
            self._watcher.changed()

    def close(self) -> None:
        """Ends the second path; the direct engine is left to its owner. Blocks until what was to be
        dropped is dropped."""
        log.debug("%s: %s", self.routes.direct.where, self._accounting.line())
        with self._lock:
            self._closed = True
            if self.routes.copy is not None:
                self.routes.copy.close()
        self.backlog.close()
        if self._watcher is not None:
            self._watcher.close()
        if self._dropper is not None:
            self._dropper.close()
        if self.routes.cache is not None:
            self.routes.cache.close()
        self._memory.close()
