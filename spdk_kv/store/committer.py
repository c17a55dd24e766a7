"""The commit that makes changes last.

The order that keeps the truth: data is written, then flushed to the medium, then the records
that name it are committed; only then are extents reused that those records gave up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from spdk_kv.engines import Engine
from spdk_kv.errors import CapacityError, DeviceError, SpdkKvError
from spdk_kv.index import Index, commit_in_batches
from spdk_kv.store.quarantine import Quarantine
from spdk_kv.store.records import Changes, Records

log = logging.getLogger(__name__)


class Committer:
    """Commits the changes of ``records`` to ``index`` (None: nothing persists). Thread-safe.

    ``lock`` is held during a commit, and taken before the records' lock.
    """

    def __init__(
        self,
        records: Records,
        quarantine: Quarantine,
        engine: Engine,
        index: Index | None,
        discard: bool,
    ) -> None:
        self.lock = threading.Lock()
        self._records = records
        self._quarantine = quarantine
        self._engine = engine
        self.index = index
        self._discard = discard
        # For records that the index cannot hold, until they are raised.
        self._refused: list[CapacityError] = []

    def commit(self, timeout_s: float | None = None) -> None:
        """Data to the medium, then the records; blocks on both. What failed is tried again by the
        next commit, but for a record that the index cannot hold: CapacityError, after all others
        are committed. IndexFull: its filesystem has no room for the records."""
        self._quarantine.settle()
        records = self._records
        with self.lock:
            changes = Changes()
            try:
                records.take_changes(changes)
                if self.index is not None and (changes.blobs or changes.sequences):
                    found = (*changes.blobs.values(), *changes.sequences.values())
                    if found.count(None) < len(found):
                        self._engine.flush(timeout_s)
                    commit_in_batches(self.index, changes.blobs, changes.sequences, self._refused)
            except BaseException:
                records.give_back(changes)
                raise
            if self._discard:
                self._discard_unpinned(changes.retired)
            with records.lock:
                records.extents.committed(changes.retired)
            if self._refused:
                refused, self._refused = self._refused, []
                for each in refused[1:]:
                    log.error("%s", each)
                raise refused[0]

    def _discard_unpinned(self, offsets: Sequence[int]) -> None:
        # Before they are free: a new owner's bytes must not be discarded. No record names them
        # any more, so nobody can pin what is unpinned now.
        extents = self._records.extents
        with self._records.lock:
            ranges = [
                (offset, extents.allocator.extent_nbytes(offset))
                for offset in offsets
                if not extents.is_pinned(offset)
            ]
        for offset, nbytes in ranges:
            try:
                self._engine.discard(offset, nbytes)
            except DeviceError as refused:
                log.warning("the drive takes no discards, so there will be none: %s", refused)
                self._discard = False
                return

    def save_order(self) -> None:
        """Records which blobs were used last, for eviction after a reopening. Blocks on the disk
        of the index. Nothing is lost where that fails, so it is logged only."""
        if self.index is None or not self._records.order_changed:
            return
        try:
            self.index.touch_order(self._records.blobs)
        except SpdkKvError as failure:
            log.warning("the order in which blobs were used is not kept: %s", failure)
