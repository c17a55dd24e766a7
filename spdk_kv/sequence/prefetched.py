"""What is read ahead of one layer, until it is taken or no longer needed."""

from __future__ import annotations

from spdk_kv._native.holding import Hold
from spdk_kv.paths import ReadAheadAdmission
from spdk_kv.sequence.reading import Reading


class Prefetched:
    """Holds at most one reading. ``admission`` counts its memory while it is here."""

    def __init__(self, admission: ReadAheadAdmission) -> None:
        self._admission = admission
        # Always both, or an interrupt between them would leave memory counted that nobody holds.
        self._held: tuple[Reading, Hold] | None = None

    @property
    def reading(self) -> Reading | None:
        """What is held."""
        return None if self._held is None else self._held[0]

    def put(self, reading: Reading) -> None:
        """Holds ``reading``, in place of another."""
        self.drop()
        self._held = (reading, self._admission.hold(reading.buffer.nbytes))

    def take(self) -> Reading | None:
        """Hands the reading over, if there is one."""
        held, self._held = self._held, None
        return None if held is None else held[0]

    def drop(self) -> None:
        """Cancels the reading: what is not under way yet is not read."""
        reading = self.take()
        if reading is not None:
            reading.cancel()
