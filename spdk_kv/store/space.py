"""The part of a store that gives space back: :meth:`KVStore.trim`, :meth:`KVStore.compact`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from spdk_kv.deadline import Deadline
from spdk_kv.placement import StagingPool
from spdk_kv.store.catalog import Catalog

T = TypeVar("T")


class SpaceCalls(ABC):
    """See :class:`KVStore`."""

    catalog: Catalog
    staging: StagingPool
    _stop: threading.Event

    @abstractmethod
    def flush(self, timeout_s: float | None = None) -> None: ...

    @abstractmethod
    def run_in_background(self, work: Callable[[], T]) -> Future[T]: ...

    def trim(self, timeout_s: float | None = None) -> int:
        """Flushes, then gives all free space back, whatever ``EngineOptions.discard`` is: the end
        and the holes of a data file to its filesystem; a drive is told of all that is free (TRIM).

        Blocks until it is done. Puts and gets of other threads go on.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            How many bytes went back: of a file those that it takes less of its filesystem, of a
            drive those that it was told of.

        Raises:
            DeviceError: The drive refused or failed; or as :meth:`flush`.
            DeviceTimeout: It takes longer; it goes on by itself.
            ReadOnlyStore: The store is open ``read_only``.
            ClosedError: The store is closed.
        """
        deadline = Deadline(timeout_s)
        self.flush(deadline.left_s())
        return self.catalog.trimmer.trim(deadline=deadline)

    def compact(self, timeout_s: float | None = None) -> int:
        """Moves blobs from the end of the store into free space nearer to its beginning, then gives
        free space back as :meth:`trim` does. Sequences stay where they are.

        A data file gets shorter by it, free space contiguous, and the store can be opened with a
        smaller capacity. Blocks until it is done. Puts, gets and deletes of other threads go on; a
        blob that is replaced or deleted meanwhile is not brought back. Each blob's checksum is
        verified when it is copied; a damaged one stays where it is. Takes 16 MiB of memory.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            How many bytes went back, as :meth:`trim`.

        Raises:
            CapacityError: The filesystem is so full that there is no room to move to.
            DeviceError: The drive failed; or as :meth:`flush`.
            DeviceTimeout: It takes longer; it goes on until it is done or the store is closed.
            ReadOnlyStore: The store is open ``read_only``.
            ClosedError: The store is closed.
        """
        deadline = Deadline(timeout_s)
        self.flush(deadline.left_s())
        catalog, staging, stopping = self.catalog, self.staging, self._stop
        work = self.run_in_background(lambda: catalog.compact(staging, stopping.is_set))
        wait([work], deadline.left_s())
        if not work.done():
            raise deadline.error("compaction")
        return work.result()
