"""What is read ahead of one layer, until it is taken or nobody wants it any more."""

from __future__ import annotations

from spdk_kv.paths import Orchestrator
from spdk_kv.sequence.reading import Reading


class Prefetched:
    """Room for one reading. Its memory counts as held ahead in ``paths``, for as long."""

    def __init__(self, paths: Orchestrator) -> None:
        self._paths = paths
        self.reading: Reading | None = None

    def put(self, reading: Reading) -> None:
        """Takes up a reading, in the place of another."""
        self.drop()
        self.reading = reading
        self._paths.hold_ahead(reading.room.nbytes)

    def take(self) -> Reading | None:
        """Hands the reading over, if there is one."""
        reading, self.reading = self.reading, None
        if reading is not None:
            self._paths.hold_ahead(-reading.room.nbytes)
        return reading

    def drop(self) -> None:
        """Nobody wants it: what is not on its way yet is not read."""
        reading = self.take()
        if reading is not None:
            reading.cancel()
