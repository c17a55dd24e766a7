"""The steps that close a store: each is done once, also where an interrupt comes between."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Closing:
    """Runs ``steps`` in order.

    An error of one does not keep the others from being done. Ctrl-C does: it ends the caller's
    wait, and :meth:`run` called again goes on with the step that was interrupted. So a step has to
    be one that may be repeated, and must not hold the store: that one would live until the garbage
    collector comes.
    """

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._left = deque(steps)
        self._failure: Exception | None = None
        self._lock = threading.RLock()

    def is_over(self) -> bool:
        """Whether everything was done."""
        return not self._left

    def run(self) -> None:
        """Does what is left to do, then raises the first error that there was, once. Another
        thread that comes here meanwhile waits."""
        with self._lock:
            while self._left:
                step = self._left[0]
                try:
                    step()
                except Exception as failed:
                    self._failure = self._failure or failed
                if self._left and self._left[0] is step:  # not done by a finalizer amid it
                    self._left.popleft()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
