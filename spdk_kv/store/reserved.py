"""Free runs that nobody can be given, while they are punched or filled with what moves there."""

from __future__ import annotations

import threading
import weakref

from spdk_kv.deadline import Deadline
from spdk_kv.store.records import Records

# Nobody says so when a turn was forgotten.
_FORGOTTEN_S = 0.1


class Reserved:
    """Free runs taken out of what is handed out, for a while. Thread-safe.

    They are extents like any other meanwhile, also for who recovers from an interrupt, so that no
    put can have one. A put that finds no room waits until all of them came back (:meth:`wait`), and
    no more are taken before it has its own.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._runs: dict[int, int] = {}
        self._changed = threading.Condition(records.lock)
        # Weak: one that an interrupt made somebody forget must not be waited for.
        self._turns: weakref.WeakSet[Turn] = weakref.WeakSet()
        self.waits = 0
        """How often somebody had to wait for one."""

    def __bool__(self) -> bool:
        return bool(self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes that are free, but for this."""
        return sum(self._runs.values())

    @property
    def offsets(self) -> set[int]:
        """Where they begin."""
        return set(self._runs)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits, so that nothing can be taken."""
        return bool(self._turns)

    def take(self, run: int, start: int, nbytes: int) -> bool:
        """Reserves ``[start, start + nbytes)`` of the free run that begins at ``run``. False where
        that is not free (any more), or somebody waits for room."""
        with self._records.lock:
            if self.is_wanted:
                return False
            if not self._records.extents.allocator.take_free(run, start, nbytes):
                return False
            self._runs[start] = nbytes
            return True

    def give_back(self, start: int) -> None:
        """It is free again."""
        with self._changed:
            del self._runs[start]
            self._records.extents.allocator.free(start)
            self._records.extents.freed_count += 1
            self._changed.notify_all()

    def keep(self, start: int) -> None:
        """It is an extent that somebody uses from now on."""
        with self._changed:
            del self._runs[start]
            self._changed.notify_all()

    def wait(self, turn: Turn, deadline: Deadline) -> None:
        """Blocks until nothing is reserved, and keeps it so until :meth:`end` of ``turn``.
        DeviceTimeout past ``deadline``."""
        with self._changed:
            self._turns.add(turn)
            self.waits += 1
            while self._runs:
                if deadline.is_past:
                    raise deadline.error("giving space back to the drive")
                self._changed.wait(deadline.left_s())

    def end(self, turn: Turn) -> None:
        """Who waited has what it wanted, or gave up."""
        with self._changed:
            self._turns.discard(turn)
            self._changed.notify_all()

    def wait_until_unwanted(self) -> None:
        """Blocks until nobody waits any more."""
        with self._changed:
            while self.is_wanted:
                self._changed.wait(_FORGOTTEN_S)


class Turn:
    """One request for room, which may have to wait. ``has_made_idle``: whether sequences that
    nobody uses were recorded for it, so that they can go."""

    has_made_idle = False
