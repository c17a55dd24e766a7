"""The stores of one rank: its own, and the one of what all tensor-parallel ranks have alike."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.opening import Opening
from spdk_kv.integrations.sglang.options import StorageConfig, place
from spdk_kv.integrations.waits import wait
from spdk_kv.store import KVStore

log = logging.getLogger(__name__)

# A reader may be there before the rank that writes has begun the store.
_RETRY_S = 1.0


class Stores:
    """Opens what a rank needs, and closes it. Thread-safe.

    ``writes_shared``: whether this rank writes what all have alike; it then has one store for both.
    """

    def __init__(self, options: Opening, config: StorageConfig) -> None:
        """Opens the store that this rank writes, or reads; blocks on the drive. Raises what
        :func:`spdk_kv.open` raises, such as StoreLocked."""
        self._options = options
        self._lock = threading.Lock()
        self._is_replicated = config.is_mla_model and config.tp_size > 1
        self.writes_shared = bool(getattr(config, "is_storage_writer", True))
        self._own_location = place(options.location, config, shared=False)
        self._shared_location = self._own_location
        if self._is_replicated:
            self._shared_location = place(options.location, config, shared=True)
        self._own: KVStore | None = None
        self._shared: KVStore | None = None
        self._retry_at = 0.0
        self._closed = False
        self._users = 0
        self._unused = threading.Condition()
        if self.writes_shared:
            read_only = options.read_only
            self._own = self._shared = self._open(self._shared_location, read_only=read_only)

    def _open(self, location: str, *, read_only: bool) -> KVStore:
        store = self._options.open(location, read_only=read_only)
        log.info("%r is open for SGLang%s", store, " (read_only)" if read_only else "")
        return store

    @contextmanager
    def use(self, *, shared: bool) -> Iterator[KVStore | None]:
        """:meth:`shared`, or :meth:`own`, for a call that moves pages: :meth:`close` waits for its
        end. Raises as those do."""
        with self._unused:
            self._users += 1
        try:
            yield self.shared() if shared else self.own()
        finally:
            with self._unused:
                self._users -= 1
                self._unused.notify_all()

    def shared(self) -> KVStore | None:
        """Where KV pages are: this rank's store, or a reader of the one that another rank writes.
        None while that one is not there yet, and after close."""
        if self._shared is None and not self._closed:
            with self._lock:
                if self._shared is None and not self._closed and time.monotonic() > self._retry_at:
                    self._retry_at = time.monotonic() + _RETRY_S
                    try:
                        self._shared = self._open(self._shared_location, read_only=True)
                    except (SpdkKvError, ValueError) as why:
                        log.info("%s cannot be read yet: %s", self._shared_location, why)
        return self._shared

    def own(self) -> KVStore | None:
        """Where this rank keeps what no other rank has. Opened when it is first needed. None after
        close. Raises as the constructor does."""
        if self._own is None and not self._closed:
            with self._lock:
                if self._own is None and not self._closed:
                    read_only = self._options.read_only
                    self._own = self._open(self._own_location, read_only=read_only)
        return self._own

    def opened(self) -> list[KVStore]:
        """What is open, each once."""
        found = {id(store): store for store in (self._own, self._shared) if store is not None}
        return list(found.values())

    def close(self) -> None:
        """Flushes and closes what is open; a failure is logged. May be called twice.

        Blocks until calls that move pages are over, as long as the drive takes: it may use the
        memory of their pages until then.
        """
        with self._lock:
            self._closed = True
            stores = self.opened()
            self._own = self._shared = None
        wait(self._are_unused, lambda: self._in_use(stores))
        for store in stores:
            try:
                store.close()
            except Exception:  # whatever it is: the other one is to be closed as well
                log.exception("closing %r", store)

    def _are_unused(self, patience_s: float) -> bool:
        with self._unused:
            return self._unused.wait_for(lambda: not self._users, patience_s)

    def _in_use(self, stores: list[KVStore]) -> str:
        places = ", ".join(store.location for store in stores)
        return f"closing waits for the drive of {places}: {self._users} calls that move pages"
