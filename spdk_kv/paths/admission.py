"""How much memory may hold what is read ahead."""

from __future__ import annotations

import threading


class ReadAheadAdmission:
    """Counts the memory held by reads that nobody has asked for yet. Thread-safe.

    ``limit_nbytes``: staging memory that reading ahead may use.

    A read on demand overtakes what is read ahead within each engine, so it waits only for the
    commands in flight.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.held_nbytes = 0
        self.lock = threading.Lock()
        """Callers hold it from `admits` to `hold`, so that no two take the same room."""
        self._counting = threading.Lock()

    def admits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be read ahead now. One reading always may, however large."""
        held = self.held_nbytes
        return held == 0 or held + nbytes <= self.limit_nbytes

    def hold(self, nbytes: int) -> None:
        """Counts memory that reading ahead has taken."""
        with self._counting:
            self.held_nbytes += nbytes

    def release(self, nbytes: int) -> None:
        """Counts memory that it has given back."""
        with self._counting:
            self.held_nbytes -= nbytes
