"""The commit that makes changes last.

The order that keeps the truth: data is written, then flushed to the medium, then the records
that name it are committed, and the drive is told of the commit; only then are extents written over
that those records gave up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import Engine
from spdk_kv.errors import CapacityError, SpdkKvError
from spdk_kv.index import Index, SequenceRecord, commit_in_batches
from spdk_kv.store.dataflush import DataFlush
from spdk_kv.store.places import Places
from spdk_kv.store.quarantine import Quarantine
from spdk_kv.store.records import Changes, Records
from spdk_kv.store.superblocks import CountWriter

log = logging.getLogger(__name__)

SEQUENCE_AGES = "sequence_ages"
"""The name in the index of how many uses ago each sequence was used."""


# Of more blobs that were used since the store was opened, the order in which those before them were
# used is kept by the summary alone.
_MOST_TOUCHED = 50_000


def nothing() -> None:
    """Does nothing."""


class Committer:
    """Commits the changes of ``records`` to ``index`` (None: nothing persists). Thread-safe.

    ``lock`` is held during a commit, and taken before the records' lock. ``places``: the files
    without which nobody would find what is committed.
    """

    def __init__(
        self,
        records: Records,
        quarantine: Quarantine,
        engine: Engine,
        index: Index | None,
        places: Places,
    ) -> None:
        self.lock = threading.Lock()
        self.data = DataFlush(engine)
        self._places = places
        self._records = records
        self._quarantine = quarantine
        self._engine = engine
        self.index = index
        self._count = None if index is None else CountWriter(engine, index)
        self.on_freed: Callable[[], None] = nothing
        """Called after a commit that freed extents. It must not block."""
        # For records that the index cannot hold, until they are raised.
        self._refused: list[CapacityError] = []
        # The index lacks some of what is stored.
        self._has_refused = False
        # A commit that has not begun: it will have all changes made until then.
        self._next: Future[None] | None = None
        # The longest that anybody waits for it: what ends one caller's wait fails no other's.
        self._next_timeout_s = 0.0
        self._next_lock = threading.Lock()

    def commit(self, deadline: Deadline = NEVER) -> None:
        """Data to the medium, then the records; blocks on both. What failed is tried again by the
        next commit, but for a record that the index cannot hold: CapacityError, after all others
        are committed. IndexFull: its filesystem has no room for the records. DeviceGone: its files
        are gone. DeviceTimeout past ``deadline``; the commit goes on by itself then."""
        self._quarantine.settle()
        timeout_s = deadline.left_s()
        if timeout_s is None:
            with self.lock:
                self._commit(None)
            return
        commit = self._begin(timeout_s)
        wait([commit], timeout_s)
        if not commit.done():
            raise deadline.error(f"the commit of {self._engine.where}")
        commit.result()

    def _begin(self, timeout_s: float) -> Future[None]:
        """A commit on a thread of its own, since SQLite knows no deadline."""
        with self._next_lock:
            if self._next is None:
                begun: Future[None] = Future()
                run = threading.Thread(
                    target=self._run, args=(begun,), name="spdk_kv-commit", daemon=True
                )
                self._next_timeout_s = 0.0
                run.start()
                self._next = begun
            self._next_timeout_s = max(self._next_timeout_s, timeout_s)
            return self._next

    def _run(self, begun: Future[None]) -> None:
        with self.lock:
            with self._next_lock:
                self._next = None
                timeout_s = self._next_timeout_s
            try:
                self._commit(timeout_s)
            except BaseException as failure:  # raised again by whoever waits for it
                begun.set_exception(failure)
            else:
                begun.set_result(None)

    def _commit(self, timeout_s: float | None) -> None:
        records = self._records
        changes = Changes()
        recorded: dict[str, SequenceRecord | None] = {}
        try:
            records.take_changes(changes)
            if self.index is not None and self._count is not None:
                self.data.check()
                self._places.check()
                recorded = dict(changes.sequences)
                found = (*changes.blobs.values(), *changes.sequences.values())
                if found.count(None) < len(found):
                    self.data.flush(timeout_s)
                if found:
                    commit_in_batches(self.index, changes.blobs, changes.sequences, self._refused)
                self._count.update(timeout_s)
                self._places.check()
                if self._refused:
                    self._has_refused = True
                    recorded = {}  # some of them it does not have
        except BaseException:
            records.give_back(changes)
            raise
        records.committed(recorded, changes.retired)
        if changes.retired:
            self.on_freed()
        if self._refused:
            refused, self._refused = self._refused, []
            for each in refused[1:]:
                log.error("%s", each)
            raise refused[0]

    def settle(self, deadline: Deadline = NEVER) -> None:
        """Blocks until what commits let go of may be overwritten, which is soon after the last one.
        DeviceTimeout past ``deadline``."""
        if self._count is not None:
            self._count.settle(deadline)

    def end(self) -> None:
        """After all that the index gets: the drive has its number, too, and what belongs to the
        drive is given up."""
        if self._count is not None:
            self._count.update(None)
            self._count.end()

    def save_order(self) -> None:
        """Records what was used last, for eviction after a reopening, and all blobs in one file,
        so that it is fast. Blocks on the disk of the index. Nothing is lost where that fails, so it
        is logged only."""
        records = self._records
        if self.index is None:
            return
        try:
            if records.order_changed:
                self.index.touch_order(records.recently_used(_MOST_TOUCHED))
            if records.uses.changed:
                ages = records.uses.ages(records.residents.now)
                if ages is not None:
                    self.index.set_meta(SEQUENCE_AGES, ages)
            self._save_summary(self.index)
        except (SpdkKvError, OSError) as failure:
            log.warning("the order in which things were used is not kept: %s", failure)
        except RuntimeError:
            log.info("blobs are in use while their store is closed: the next open reads each row")

    def _save_summary(self, index: Index) -> None:
        records = self._records
        with records.lock:
            changes = records.blobs.changes
            is_known = changes == records.opened_changes and index.has_summary
            if records.dirty or self._has_refused or is_known:
                return
        index.save_summary(records.blobs, changes)
