"""How much memory may hold what is read ahead."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from spdk_kv._native.holding import Account, Hold

# A sequence that was not read for so long gives up what was read ahead of it, if another has no
# room. Chosen: longer than a decode step of sequences that take turns, short for one that waits.
_IDLE_S = 2.0


class Holder(Protocol):
    """A sequence, as far as it holds what was read ahead."""

    def give_up(self) -> bool:
        """Drops that, and returns whether it was all: layers in use just now keep theirs. Does not
        wait."""


class ReadAheadAdmission:
    """Counts the memory held by reads that nobody has asked for yet. Thread-safe.

    ``limit_nbytes``: staging memory that reading ahead may use. ``clock``: seconds.

    A read on demand overtakes what is read ahead within each engine, so it waits only for the
    commands in flight.
    """

    def __init__(self, limit_nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_nbytes = limit_nbytes
        self.lock = threading.Lock()
        """Callers hold it from `admits` to `hold`, so that no two take the same room."""
        self._account = Account()
        self._clock = clock
        # When each was last in use, the one idle for longest first.
        self._holders: dict[weakref.ref[Holder], float] = {}
        self._order_lock = threading.Lock()

    @property
    def held_nbytes(self) -> int:
        """What is held in all."""
        return self._account.nbytes

    def admits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be read ahead now. One reading always may, however large.

        What sequences hold that were left alone gives way.
        """
        while not self._has_room(nbytes):
            idle = self._next_idle()
            if idle is None:
                return False
            if not idle.give_up():
                self.in_use(idle)
        return True

    def _has_room(self, nbytes: int) -> bool:
        held = self.held_nbytes
        return held == 0 or held + nbytes <= self.limit_nbytes

    def _next_idle(self) -> Holder | None:
        """The sequence that has been idle for longest, if for long enough; no longer a holder."""
        with self._order_lock:
            while self._holders:
                reference = next(iter(self._holders))
                if self._clock() - self._holders[reference] < _IDLE_S:
                    return None
                del self._holders[reference]
                holder = reference()
                if holder is not None:
                    return holder
        return None

    def hold(self, nbytes: int) -> Hold:
        """Counts memory that reading ahead has taken, for as long as the result is kept."""
        return self._account.hold(nbytes)

    def in_use(self, holder: Holder) -> None:
        """``holder`` was read just now, or begins to read ahead."""
        reference = weakref.ref(holder)
        with self._order_lock:
            self._holders.pop(reference, None)
            self._holders[reference] = self._clock()
