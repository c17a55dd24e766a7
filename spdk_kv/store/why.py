"""The last decision of an open store, in a small file beside its index for other processes.

``spdk-kv stat --why`` shows why a layer is on its path. It runs in another process, while the store
is locked by its owner, so the owner writes its decisions down.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

FILE_NAME = "residency.json"
_INTERVAL_S = 1.0


class WhyFile:
    """Keeps ``residency.json`` in ``folder`` up to date with ``summary()``; 0600, never torn.

    :meth:`changed` does not block: a thread writes at most once a second, and always writes the
    last state. The file is not synced, because nothing decides after a crash. Thread-safe; does
    nothing in a child after fork.
    """

    def __init__(self, folder: str, summary: Callable[[], dict[str, Any]]) -> None:
        self.path = os.path.join(folder, FILE_NAME)
        self._summary = summary
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._remove()  # a killed owner's

    def changed(self) -> None:
        """Asks for the file to be written again."""
        if os.getpid() != self._pid or self._wanted.is_set():
            return
        self._wanted.set()
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="spdk_kv-why", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stops writing and removes the file."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._stop.set()
            thread = self._thread
        self._wanted.set()
        if thread is not None:
            thread.join()
            self._remove()

    def _run(self) -> None:
        while self._wanted.wait() and not self._stop.is_set():
            self._wanted.clear()
            try:
                self._write()
            except OSError as refused:  # a full disk must not disturb decisions
                log.debug("%s is not written: %s", self.path, refused)
            self._stop.wait(_INTERVAL_S)

    def _write(self) -> None:
        state = {"pid": self._pid, "time": time.time(), **self._summary()}
        new = f"{self.path}.new"
        with suppress(FileNotFoundError):
            os.unlink(new)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, 0o600)  # whatever the umask
            json.dump(state, file)
        os.replace(new, self.path)

    def _remove(self) -> None:
        with suppress(OSError):
            os.unlink(self.path)


def read_why(folder: str) -> dict[str, Any] | None:
    """What the store whose index lies in ``folder`` wrote last; None if there is nothing valid."""
    try:
        with open(os.path.join(folder, FILE_NAME), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else None
