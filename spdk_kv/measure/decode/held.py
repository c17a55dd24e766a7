"""What a memory group holds besides the page cache, watched while something runs in it."""

from __future__ import annotations

import threading

from spdk_kv.binding import MemoryGroup

# A layer of a replay takes tens of milliseconds; reading two small files takes a tenth of one.
_INTERVAL_S = 0.02


class HeldMemory:
    """The most that ``group`` held besides the page cache, by a thread that looks every 20 ms.

    A limit leaves to the page cache what is not held then: at other moments more is free, but what
    was dropped for the peak has to be read from the drive again.
    """

    def __init__(self, group: MemoryGroup, interval_s: float = _INTERVAL_S) -> None:
        self._group = group
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._most_nbytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="held-memory", daemon=True)
        self._thread.start()

    def take(self) -> int:
        """The most since the last call, in bytes; looks once more first."""
        self._look()
        with self._lock:
            most, self._most_nbytes = self._most_nbytes, 0
        return most

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        with self._lock:  # or what was held before a take() would be noted behind it
            self._most_nbytes = max(self._most_nbytes, self._group.use().other_nbytes)


class Budget:
    """Keeps a group's limit so that the page cache may hold ``cache_nbytes``, whatever else the
    group holds. ``held_nbytes``: what it is expected to hold besides at first.

    Following what is really held matters: the prompt holds more than decoding, and what falls free
    after it would go to the page cache.
    """

    # A limit that is as near to what it should be stays: each change may reclaim.
    _NEAR_SHARE = 0.005

    def __init__(self, group: MemoryGroup, cache_nbytes: int, held_nbytes: int) -> None:
        self._group = group
        self._cache_nbytes = cache_nbytes
        self._held_nbytes = held_nbytes
        self.limit_nbytes = held_nbytes + cache_nbytes
        group.limit(self.limit_nbytes)

    def follow(self, held_nbytes: int) -> None:
        """Sets the limit by what the last step held; blocks while the kernel reclaims."""
        self._held_nbytes = held_nbytes
        wanted = held_nbytes + self._cache_nbytes
        if abs(wanted - self.limit_nbytes) > self._NEAR_SHARE * self._cache_nbytes:
            self.limit_nbytes = wanted
            self._group.limit(wanted)

    def change(self, cache_nbytes: int) -> None:
        """Another budget from here on."""
        self._cache_nbytes = cache_nbytes
        self.follow(self._held_nbytes)
