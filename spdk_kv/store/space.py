"""The part of a store that gives space back: :meth:`KVStore.trim`."""

from __future__ import annotations

from spdk_kv.deadline import Deadline
from spdk_kv.store.catalog import Catalog


class SpaceCalls:
    """See :class:`KVStore`."""

    catalog: Catalog

    def flush(self, timeout_s: float | None = None) -> None:
        """As :meth:`KVStore.flush`."""
        raise NotImplementedError

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
            ClosedError: The store is closed.
        """
        deadline = Deadline(timeout_s)
        self.flush(deadline.left_s())
        return self.catalog.trimmer.trim(deadline=deadline)
