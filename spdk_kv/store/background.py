"""What stores do in the background: asynchronous work, regular flushes, close at exit."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from spdk_kv.engines import Callbacks
from spdk_kv.errors import ClosedError, SpdkKvError

log = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS = 4
# As long as an engine waits for its drive when it is closed.
_CLOSE_TIMEOUT_S = 30.0


class Background:
    """The asynchronous work of one store, and its end. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._callbacks = Callbacks("spdk_kv-async-callbacks")
        self._writes: set[Future[Any]] = set()
        self._closed = False

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Runs ``work`` on one of a few threads. ClosedError after close."""
        with self._lock:
            if self._closed:
                raise ClosedError("the store is being closed")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="spdk_kv-async")
            future: Future[T] = self._callbacks.future()
            self._executor.submit(_complete, future, work)
            return future

    def track(self, write: Future[T]) -> Future[T]:
        """Makes :meth:`close` wait for a write that the engine does."""
        with self._lock:
            self._writes.add(write)
        # On the thread that completes it: handing this on to that for callbacks would take longer
        # than doing it.
        Future.add_done_callback(write, self._forget)
        return write

    def _forget(self, write: Future[Any]) -> None:
        with self._lock:
            self._writes.discard(write)

    def close(self) -> None:
        """Waits for work that was begun (for writes 30 s at most), and refuses new work."""
        with self._lock:
            self._closed = True
            executor, writes = self._executor, list(self._writes)
        if executor is not None:
            executor.shutdown()
        wait(writes, _CLOSE_TIMEOUT_S)
        self._callbacks.close(_CLOSE_TIMEOUT_S)


def _complete(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as failure:  # raised again by whoever waits for the future
        future.set_exception(failure)
    else:
        future.set_result(result)


class Flushable(Protocol):
    """An open store."""

    @property
    def location(self) -> str: ...
    @property
    def dirty(self) -> bool: ...
    def count_failed_flush(self) -> None: ...
    def flush_in_background(self) -> None: ...
    def close(self) -> None: ...


_open_stores: weakref.WeakSet[Flushable] = weakref.WeakSet()


def opened(store: Flushable) -> None:
    """Registers ``store`` to be closed when the interpreter exits."""
    _open_stores.add(store)


def closed(store: Flushable) -> None:
    """Ends what :func:`opened` began."""
    _open_stores.discard(store)


def flush_every(store: Flushable, stop: threading.Event, interval_s: float) -> None:
    """Starts a thread that flushes ``store`` until ``stop`` is set or the store is gone."""
    threading.Thread(
        target=_flush_regularly,
        args=(weakref.ref(store), stop, interval_s),
        name="spdk_kv-flush",
        daemon=True,
    ).start()


def _flush_regularly(
    reference: weakref.ref[Flushable], stop: threading.Event, interval_s: float
) -> None:
    while not stop.wait(interval_s):
        store = reference()
        if store is None:
            return
        _flush(store)
        del store


def _flush(store: Flushable) -> None:
    """Flushes what is not durable yet; logs and counts what fails. Nothing ends the thread: without
    it nothing would be flushed any more, and nobody would know."""
    try:
        if store.dirty:
            store.flush_in_background()
    except ClosedError:
        pass
    except BaseException:
        store.count_failed_flush()
        log.exception("background flush of %s; the next one tries again", store.location)


def _close_all() -> None:
    for store in list(_open_stores):
        try:
            store.close()
        except SpdkKvError:
            log.exception("closing %s at exit", store.location)


atexit.register(_close_all)
