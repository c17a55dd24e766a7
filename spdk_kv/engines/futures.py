"""Futures whose callbacks run on a thread of their own, where they can stop nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Callback = Callable[[Future[Any]], object]

log = logging.getLogger(__name__)


class Callbacks:
    """Calls what was given to ``add_done_callback``, in order, on one thread.

    Not on the thread that completes the futures: a callback may wait for another future, flush or
    close the store, or raise SystemExit, and none of that may end what everybody waits for.
    Thread-safe.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._todo: SimpleQueue[tuple[Callback, Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def future(self) -> Future[Any]:
        """A new future with its callbacks here. It is not running yet."""
        return _Future(self)

    def start(self) -> None:
        """Starts the thread unless it runs; RuntimeError where none can be started."""
        with self._lock:
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def call(self, callback: Callback, future: Future[Any]) -> None:
        """Has the thread call ``callback`` with ``future``."""
        with self._lock:
            if not self._closed:
                self._todo.put((callback, future))
                return
        _call(callback, future)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            _call(*item)
            del item  # or its memory would live until the next

    def close(self, timeout_s: float) -> None:
        """Ends the thread after the callbacks of futures that are done. Blocks until then, for
        ``timeout_s`` at most; not at all in a callback."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._todo.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)


def _call(callback: Callback, future: Future[Any]) -> None:
    try:
        callback(future)
    except BaseException:  # what concurrent.futures does with an Exception
        log.exception("exception calling callback for %r", future)


class _Future(Future[T]):
    def __init__(self, callbacks: Callbacks) -> None:
        super().__init__()
        self._on_thread = callbacks

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """As Future's; ``fn`` is called on a thread for callbacks, at once where it is done."""
        if self.done():
            super().add_done_callback(fn)
            return
        self._on_thread.start()
        super().add_done_callback(lambda future: self._on_thread.call(fn, future))
