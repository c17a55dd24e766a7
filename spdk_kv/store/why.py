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

from spdk_kv.errors import StoreMismatch

log = logging.getLogger(__name__)

FILE_NAME = "residency.json"
# Raised whenever a field changes its name or meaning, since the reader may be another version. The
# first format had no number.
FORMAT = 2
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
        while True:
            self._wanted.wait()
            # Before the look at `_stop`: close() sets that first, and then this.
            self._wanted.clear()
            if self._stop.is_set():
                return
            try:
                self._write()
            except OSError as refused:  # a full disk must not disturb decisions
                log.debug("%s is not written: %s", self.path, refused)
            except Exception:  # nor end this thread, which would leave an old state there
                log.exception("%s is not written", self.path)
            self._stop.wait(_INTERVAL_S)

    def _write(self) -> None:
        state = {"format": FORMAT, "pid": self._pid, "time": time.time(), **self._summary()}
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


def read_why(folder: str, pid: int | None = None) -> dict[str, Any] | None:
    """The last decision of the store whose index is in ``folder``.

    Args:
        folder: where the index is.
        pid: the process that has the store open. What another process left is ignored.

    Returns:
        None if there is no decision, or the file is nonsense.

    Raises:
        StoreMismatch: another version of spdk_kv wrote the file.
    """
    try:
        with open(os.path.join(folder, FILE_NAME), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("pid"), int):
        return None
    if pid is not None and found["pid"] != pid:
        return None
    if found.get("format") != FORMAT:
        raise StoreMismatch(
            f"process {found['pid']}, which has the store open, runs another version of spdk_kv "
            f"(its {FILE_NAME} has format {found.get('format', 1)}, this version reads {FORMAT}); "
            "ask with that version"
        )
    return found
