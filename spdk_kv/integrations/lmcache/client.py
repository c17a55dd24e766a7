"""What LMCache's adapter `native_plugin` drives: batches in, completions out, an eventfd between.

The contract is that of `NativeConnectorL2Adapter`: submits come under its lock, completions are
drained by one thread of it that polls the eventfd.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from spdk_kv.errors import ClosedError
from spdk_kv.integrations.jobs import Finished, Jobs
from spdk_kv.integrations.lmcache.options import Options

log = logging.getLogger(__name__)

# How often the log says that batches are declined, which may be true of each.
_SAID_EVERY_S = 10.0

Completion = tuple[int, bool, str, list[bool] | None]
"""A batch's number, whether it is done, why it is not, and an answer for each of its keys."""


class Client:
    """A store for LMCache; its configuration names this class and gives ``adapter_params``.

    Nothing but the opening and :meth:`close` waits for the drive. Thread-safe. What is loaded is
    what was stored under that key, in that length, or the load of that key fails: LMCache takes it
    as a miss.
    """

    def __init__(self, **adapter_params: Any) -> None:
        """Opens the store; blocks until that is done.

        Args:
            adapter_params: As :meth:`Options.parse` takes them.

        Raises:
            TypeError, ValueError: An option is unknown or makes no sense.
            StoreLocked: Another process has it open; give ``read_only`` to read beside it.
            SpdkKvError: What else :func:`spdk_kv.open` raises.
        """
        options = Options.parse(adapter_params)
        identity = options.opening.identity
        # Quoted: names of models have slashes as well, and "a" and "b/c" is not "a/b" and "c".
        self.prefix = f"{json.dumps(identity)}/" if identity else ""
        """What stands before LMCache's keys in the store."""
        self._pid = os.getpid()
        self.store = options.opening.open()
        self._lock = threading.Lock()
        # Batches of which LMCache asks for one answer alone.
        self._sets: set[int] = set()
        self._unsaid = 0
        self._said_s = -_SAID_EVERY_S
        # The descriptor's: after close its number may be another file's.
        self._fd_lock = threading.Lock()
        self._closed = False
        self._event_fd = -1
        try:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._jobs = Jobs(
                self.store,
                on_finished=self._tell,
                workers=options.workers,
                most_pending=options.most_pending,
            )
        except BaseException:  # or another try would find the store in use
            self.store.close()
            if self._event_fd >= 0:
                os.close(self._event_fd)
            raise

    def event_fd(self) -> int:
        """A descriptor that is readable while there are completions to drain."""
        return self._event_fd

    def submit_batch_set(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Stores ``memoryviews`` (contiguous bytes of any length) under ``keys``, and replaces what
        is there. They must stay unchanged until the batch has ended.

        Returns the batch's number, as the others do. ClosedError after close, and in a process
        forked since.
        """
        self._check_fork()
        pages = self._pages(keys, memoryviews)
        # A batch may have ended before its number is known here.
        with self._lock:
            number = self._jobs.put(pages)
            self._sets.add(number)
            return number

    def submit_batch_get(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Reads what is stored under ``keys`` into ``memoryviews`` (writable). One that holds
        another number of bytes than were stored is not filled: its key counts as not found."""
        return self._jobs.get(self._pages(keys, memoryviews))

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Whether ``keys`` are stored, which is known without the drive."""
        return self._jobs.exists([self.prefix + key for key in keys])

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Forgets ``keys``, and says which of them there were."""
        return self._jobs.delete([self.prefix + key for key in keys])

    def drain_completions(self) -> list[Completion]:
        """What has ended since the last call, each batch once. Does not block. ClosedError in a
        process forked since: the descriptor is its parent's as well, who would not hear of it."""
        self._check_fork()
        # First: what ends from here on makes it readable again.
        with self._fd_lock, suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_read(self._event_fd)
        with self._lock:
            return [self._completion(finished) for finished in self._jobs.finished()]

    def close(self) -> None:
        """Waits for batches that were begun, gives up the others, and closes the store. May be
        called twice. No memory of LMCache's is used or held afterwards. What could not be made
        durable is logged: LMCache could do nothing about it. In a process forked since nothing is
        done that its parent would notice."""
        self._jobs.close()
        try:
            self.store.close()
        except Exception:  # whatever it is: the descriptor is to be closed as well
            log.exception("closing %s", self.store.location)
        if os.getpid() != self._pid:
            return  # a thread that the parent has may hold the lock here for ever
        with self._fd_lock:
            if not self._closed:
                self._closed = True
                os.close(self._event_fd)

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(f"process {self._pid} opened this, and this is a fork of it")

    def _pages(self, keys: Sequence[str], views: Sequence[Any]) -> list[tuple[str, Any]]:
        return [(self.prefix + key, view) for key, view in zip(keys, views, strict=True)]

    def _tell(self) -> None:
        with self._fd_lock:
            if not self._closed:
                os.eventfd_write(self._event_fd, 1)

    def _completion(self, finished: Finished) -> Completion:
        error = finished.error or ""
        if finished.job not in self._sets:
            return finished.job, not error, error, finished.ok
        self._sets.remove(finished.job)
        if error:
            self._say(len(finished.ok), error)
        if not error and not all(finished.ok):
            error = f"{finished.ok.count(False)} of {len(finished.ok)} were not stored; see the log"
        return finished.job, not error, error, None

    def _say(self, pages: int, why: str) -> None:
        """LMCache tells nobody why a batch was not stored."""
        self._unsaid += pages
        if time.monotonic() - self._said_s >= _SAID_EVERY_S:
            log.warning("%d pages were not stored: %s", self._unsaid, why)
            self._unsaid, self._said_s = 0, time.monotonic()
