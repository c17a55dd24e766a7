"""What is to be put right before a store is flushed."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from types import MethodType

from spdk_kv.deadline import NEVER, Deadline

log = logging.getLogger(__name__)

Call = Callable[[float | None], object]


class BeforeFlush:
    """Calls of those who have something to put before each flush, the last one included.

    Thread-safe. A call comes in the thread that flushes, with the seconds it may take (None: any),
    and without any lock of the store; it may put and read. What it raises is logged, and keeps
    nothing else from being flushed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[weakref.WeakMethod[Call]] = []

    def add(self, call: Call) -> None:
        """Adds a bound method, until its object is gone."""
        assert isinstance(call, MethodType)
        with self._lock:
            self._calls.append(weakref.WeakMethod(call))

    def remove(self, call: Call) -> None:
        """Ends what :meth:`add` began; nothing where it is over."""
        with self._lock:
            self._calls = [each for each in self._calls if each() not in (call, None)]

    def run(self, deadline: Deadline = NEVER) -> None:
        """Calls all of them. Blocks as long as they do."""
        with self._lock:
            calls = [call for each in self._calls if (call := each()) is not None]
        for call in calls:
            try:
                call(deadline.left_s())
            except Exception:
                log.exception("before a flush")
