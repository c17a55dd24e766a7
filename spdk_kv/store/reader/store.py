"""A store that is open to be read only."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NoReturn, TypeVar

from spdk_kv.deadline import Deadline
from spdk_kv.errors import KeyNotFound, ReadOnlyStore, SpdkKvError, is_unreadable
from spdk_kv.link import Links
from spdk_kv.placement import StagingPool
from spdk_kv.sequence import Sequence
from spdk_kv.store import background
from spdk_kv.store.blobs import BlobReader
from spdk_kv.store.catalog import Catalog
from spdk_kv.store.closing import Closing
from spdk_kv.store.paths import check_settings, open_paths
from spdk_kv.store.places import Places
from spdk_kv.store.reader.parts import open_readable, why_not
from spdk_kv.store.reader.records import ReadRecords
from spdk_kv.store.reader.sequences import ReadSequences
from spdk_kv.store.settings import StoreSettings
from spdk_kv.store.store import KVStore
from spdk_kv.store.superblocks import read_superblock
from spdk_kv.store.writes import Writes
from spdk_kv.types import Granularity, KVShape

T = TypeVar("T")

# A key that is overwritten as often as that while it is read once is of no use to a reader.
_ATTEMPTS = 64


class StoreReader(KVStore):
    """A store as of a flush of its writer; make one with ``spdk_kv.open(..., read_only=True)``.

    It takes up later flushes by :meth:`refresh`, when a key is not found, and when bytes are not
    those that were put because the writer has put others in their place.
    """

    def __init__(self, location: str | os.PathLike[str], settings: StoreSettings) -> None:
        self._closed = True
        self._pid = os.getpid()
        if refusal := why_not(settings):
            raise ValueError(refusal)
        check_settings(location, settings)
        parts = open_readable(location, settings)
        self._parts = parts.opened
        try:
            self.engine = self._parts.engine
            self._mmap = False
            self.verify = True
            self._found = ReadRecords(parts, partial(read_superblock, self.engine))
            self._records = self._found
            nowhere = Places(())
            self.catalog = Catalog(self._found, self.engine, None, "none", False, nowhere)
            self.staging = StagingPool(self.engine.allocate, settings.engine.staging_nbytes)
            self.paths = open_paths(self._parts, self.staging, settings)
            self.links = Links(self.paths.routes.engines)
            self._open_sequences = ReadSequences(self._found)
            self._background = background.Background()
            self.failed_flushes = 0
            self.writes = Writes(None, self.engine, None)
            self.mappings = weakref.WeakSet()
            self._stop = threading.Event()
            self.opened_s = time.time()
            self._closing = Closing(self.paths.close, self._parts.close, self._found.close)
        except BaseException:
            self._parts.close()
            parts.snapshot.close()
            parts.index.close()
            raise
        self._closed = False
        background.opened(self)

    @property
    def read_only(self) -> bool:
        """True."""
        return True

    def refresh(self) -> bool:
        """As :meth:`KVStore.refresh`."""
        self.check_open()
        is_newer = self._found.refresh()
        # Also for what another call has taken up before.
        self._open_sequences.refresh()
        return is_newer

    def check_writable(self, what: str) -> NoReturn:
        """Raises ReadOnlyStore."""
        self.check_open()
        raise ReadOnlyStore(
            f"{what}: the store at {self.location} is open read_only here; change it in the "
            "process that writes"
        )

    # -- blobs ----------------------------------------------------------------------------------

    def contains(self, key: str) -> bool:
        """Whether a blob is stored under ``key``; looks for news where it is not known."""
        self.check_open()
        return self._found.contains(key)

    __contains__ = contains

    def keys(self, prefix: str = "") -> list[str]:
        """As :meth:`KVStore.keys`, as of the last refresh."""
        self.check_open()
        return self._found.keys(prefix)

    def __len__(self) -> int:
        return 0 if self._closed else len(self._found)

    def _read(
        self,
        keys: tuple[str, ...],
        outs: tuple[Any, ...] | None,
        device: Any,
        as_numpy: bool,
        timeout_s: float | None,
    ) -> list[Any]:
        deadline = Deadline(timeout_s)
        for _ in range(_ATTEMPTS):
            reader = BlobReader(self, keys, outs, device, as_numpy)
            try:
                return reader.run(deadline.left_s())
            except SpdkKvError as failure:
                self._raise_unless_changed(keys, reader, failure)
        raise KeyNotFound(f"{len(keys)} blobs change faster than they can be read")

    def _start(
        self,
        keys: tuple[str, ...],
        outs: tuple[Any, ...] | None,
        device: Any,
        as_numpy: bool,
        timeout_s: float | None,
        pick: Callable[[list[Any]], T],
    ) -> Future[T]:
        deadline = Deadline(timeout_s)
        reader = BlobReader(self, keys, outs, device, as_numpy)
        begun = reader.start(timeout_s, lambda found: found)

        def finish() -> T:
            try:
                found = begun.result()
            except SpdkKvError as failure:
                self._raise_unless_changed(keys, reader, failure)
                found = self._read(keys, outs, device, as_numpy, deadline.left_s())
            return pick(found)

        return self.run_in_background(finish)

    def _raise_unless_changed(
        self, keys: tuple[str, ...], reader: BlobReader, failure: SpdkKvError
    ) -> None:
        """Raises ``failure`` where nothing explains it: the bytes can be read, or their record is
        still the same in the newest state of the index."""
        if not is_unreadable(failure):
            raise failure
        self._found.refresh()
        if self._found.peek(keys) == reader.records:
            self._found.count_corruption()
            raise failure

    # -- sequences ------------------------------------------------------------------------------

    def sequence(
        self,
        name: str,
        shape: KVShape | None = None,
        *,
        granularity: Granularity | None = None,
        temporary: bool = False,
    ) -> Sequence:
        """As :meth:`KVStore.sequence`, for one that exists; it is as it was at the last flush that
        was taken up, until :meth:`refresh`."""
        self.check_open()
        return self._open_sequences.get(self, name, shape, granularity)

    def sequence_note(self, name: str) -> bytes:
        """As :meth:`KVStore.sequence_note`; looks for news where there is no such sequence."""
        self.check_open()
        return self._open_sequences.note(name)

    def sequences(self) -> list[str]:
        """As :meth:`KVStore.sequences`, as of the last refresh."""
        self.check_open()
        return self._found.sequence_names()

    def why(self) -> list[dict[str, Any]]:
        """As :meth:`KVStore.why`."""
        self._open_sequences.bury()
        return super().why()

    def stats(self) -> dict[str, Any]:
        """As :meth:`KVStore.stats`. The first time after a refresh it reads all records."""
        self.check_open()
        self._found.stats()  # not with a lock held
        return super().stats()

    @property
    def dirty(self) -> bool:
        """False: there is nothing to flush."""
        return False
