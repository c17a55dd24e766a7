"""What open stores do by themselves: become durable now and then, and close at exit."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import Protocol

from spdk_kv.errors import SpdkKvError

log = logging.getLogger(__name__)


class Flushable(Protocol):
    """An open store."""

    @property
    def location(self) -> str: ...
    def flush_in_background(self) -> None: ...
    def close(self) -> None: ...


_open_stores: weakref.WeakSet[Flushable] = weakref.WeakSet()


def opened(store: Flushable) -> None:
    """From now on ``store`` is closed when the interpreter exits."""
    _open_stores.add(store)


def closed(store: Flushable) -> None:
    _open_stores.discard(store)


def flush_every(store: Flushable, stop: threading.Event, interval_s: float) -> None:
    """Starts a thread that flushes ``store`` until ``stop`` is set or the store is gone."""
    threading.Thread(
        target=_flush_now_and_then,
        args=(weakref.ref(store), stop, interval_s),
        name="spdk_kv-flush",
        daemon=True,
    ).start()


def _flush_now_and_then(
    reference: weakref.ref[Flushable], stop: threading.Event, interval_s: float
) -> None:
    while not stop.wait(interval_s):
        store = reference()
        if store is None:
            return
        store.flush_in_background()
        del store


def _close_all() -> None:
    for store in list(_open_stores):
        try:
            store.close()
        except SpdkKvError:
            log.exception("closing %s at exit", store.location)


atexit.register(_close_all)
