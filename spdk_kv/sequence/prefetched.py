"""What is read ahead of one layer, until it is taken or no longer needed."""

from __future__ import annotations

from spdk_kv.paths import ReadAheadAdmission
from spdk_kv.sequence.reading import Reading


class Prefetched:
    """Holds at most one reading. ``admission`` counts its memory while it is here."""

    def __init__(self, admission: ReadAheadAdmission) -> None:
        self._admission = admission
        self.reading: Reading | None = None

    def put(self, reading: Reading) -> None:
        """Holds ``reading``, in place of another."""
        self.drop()
        self.reading = reading
        self._admission.hold(reading.buffer.nbytes)

    def take(self) -> Reading | None:
        """Hands the reading over, if there is one."""
        reading, self.reading = self.reading, None
        if reading is not None:
            self._admission.release(reading.buffer.nbytes)
        return reading

    def drop(self) -> None:
        """Cancels the reading: what is not under way yet is not read."""
        reading = self.take()
        if reading is not None:
            reading.cancel()
