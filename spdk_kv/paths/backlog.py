"""Appended bytes of all sequences on their way to the drive: their limit, and their end."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from typing import Any, Protocol

from spdk_kv._native.holding import Account
from spdk_kv.deadline import NEVER, Busy, Deadline, if_free
from spdk_kv.errors import SpdkKvError

# Bytes on their way to the drive; beyond that an append waits. Twice what one layer may have (see
# sequence/writer.py), so that a prefill's next layer is laid out while the last one is written.
_MOST_PENDING_NBYTES = 128 << 20
# How often the memory of finished writes is taken back. Chosen: rarely enough to cost nothing, and
# soon enough that the memory of a burst of prompts does not stay away from the page cache.
_SWEEP_INTERVAL_S = 0.5


class Writing(Protocol):
    """A layer, as far as a backlog sees it."""

    @property
    def lock(self) -> Any:
        """Held around :meth:`settle`."""

    @property
    def is_writing(self) -> bool:
        """Whether writes of it are pending."""

    def settle(self, deadline: Deadline = NEVER, *, wait: bool = True) -> None:
        """Takes note of finished writes, and gives their memory back."""


class Backlog:
    """The layers that have pending writes, oldest first. Thread-safe.

    A thread settles what has finished, so that its memory comes back although nobody touches the
    layer again. ``account`` counts the pending bytes.
    """

    def __init__(
        self,
        limit_nbytes: int = _MOST_PENDING_NBYTES,
        sweep_interval_s: float = _SWEEP_INTERVAL_S,
    ) -> None:
        self.account = Account()
        self._limit_nbytes = limit_nbytes
        self._sweep_interval_s = sweep_interval_s
        self._lock = threading.Lock()
        # In the order in which they came. Not the layers themselves: a backlog keeps none alive.
        self._writing: dict[weakref.ref[Writing], None] = {}
        self._has_some = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, layer: Writing) -> None:
        """``layer`` is about to begin writes. The caller holds its lock until it has."""
        with self._lock:
            self._writing.setdefault(weakref.ref(layer))
            if self._has_some.is_set() or self._stop.is_set():
                return
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_sweep_regularly,
                    args=(weakref.ref(self), self._has_some, self._stop, self._sweep_interval_s),
                    name="spdk_kv-settle",
                    daemon=True,
                )
                self._thread.start()
            self._has_some.set()

    def make_room(self, deadline: Deadline) -> None:
        """Waits for the oldest writes while more than 128 MiB are pending. The caller holds no
        lock."""
        while self.account.nbytes > self._limit_nbytes:
            oldest = self._oldest()
            if oldest is None:
                return
            with deadline.hold(oldest.lock):
                try:
                    oldest.settle(deadline)
                except SpdkKvError:
                    if deadline.is_past:
                        raise
                    # A layer that failed says so itself.
                self._forget(weakref.ref(oldest))

    def _oldest(self) -> Writing | None:
        with self._lock:
            while self._writing:
                reference = next(iter(self._writing))
                layer = reference()
                if layer is not None:
                    return layer
                del self._writing[reference]
        return None

    def _forget(self, reference: weakref.ref[Writing]) -> None:
        with self._lock:
            self._writing.pop(reference, None)

    def sweep(self) -> None:
        """Gives the memory of finished writes back, except of layers that are in use just now."""
        with self._lock:
            references = list(self._writing)
        for reference in references:
            layer = reference()
            if layer is None:
                self._forget(reference)
                continue
            with suppress(Busy), if_free(layer.lock):
                failed = True
                with suppress(SpdkKvError):
                    layer.settle(wait=False)
                    failed = False
                # With its lock held, or it might just have begun another.
                if failed or not layer.is_writing:
                    self._forget(reference)
        with self._lock:
            # Not after close(), which sets it for the thread to see that it is over.
            if not self._writing and not self._stop.is_set():
                self._has_some.clear()

    def close(self) -> None:
        """Ends the thread."""
        with self._lock:
            self._stop.set()
            self._has_some.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()


def _sweep_regularly(
    reference: weakref.ref[Backlog],
    has_some: threading.Event,
    stop: threading.Event,
    interval_s: float,
) -> None:
    while True:
        has_some.wait()
        if stop.wait(interval_s):
            return
        backlog = reference()
        if backlog is None:
            return
        backlog.sweep()
        del backlog
