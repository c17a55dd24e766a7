"""What the drive or a mapping may still touch although its user is gone, kept until it lets go."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from spdk_kv._native.holding import AtEnd
from spdk_kv._native.transfer import Transfer
from spdk_kv.index import BlobRecord


class Quarantine:
    """Actions that wait for transfers, and unpins that wait for a safe moment. Thread-safe.

    ``lock`` is the records', ``unpin`` their :meth:`Records.unpin`.
    """

    def __init__(
        self, lock: threading.RLock, unpin: Callable[[Iterable[BlobRecord]], None]
    ) -> None:
        self._lock = lock
        self._unpin = unpin
        # After a deadline, the drive may still touch what the caller has given up.
        self._waiting: list[tuple[list[Transfer], Callable[[], None]]] = []
        self._unpinned: deque[BlobRecord] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether the drive has let go of everything, as of the last :meth:`settle`."""
        return not self._waiting

    def release(self, transfers: Sequence[Transfer], action: Callable[[], None]) -> None:
        """Runs ``action`` (an unpin, say) now, or once the drive has let go of ``transfers``."""
        in_flight = [transfer for transfer in transfers if transfer.in_flight]
        if in_flight:
            with self._lock:
                self._waiting.append((in_flight, action))
        else:
            action()

    def unpin_at_end(self, record: BlobRecord) -> AtEnd:
        """With the last reference to what this returns, the end of a pin is noted. It may come amid
        any step of the thread that holds the lock, so nothing else is changed then."""
        return AtEnd(self._unpinned.append, record)

    def settle(self) -> None:
        """Runs the actions whose transfers are over by now, and the unpins that were noted."""
        if not self._waiting and not self._unpinned:
            return
        over: list[tuple[list[Transfer], Callable[[], None]]] = []
        held: list[tuple[list[Transfer], Callable[[], None]]] = []
        with self._lock:
            while self._unpinned:
                self._unpin([self._unpinned.popleft()])
            for pair in self._waiting:
                # Evaluated once per transfer, which may end between two looks at it.
                in_flight = [transfer for transfer in pair[0] if transfer.in_flight]
                (held if in_flight else over).append(pair)
            self._waiting = held
        for _, action in over:
            action()
