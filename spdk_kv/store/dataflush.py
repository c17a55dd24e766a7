"""Flushes of the drive, and what one that failed means for all that come after it."""

from __future__ import annotations

import errno

from spdk_kv._native.transfer import FLUSH, Transfer
from spdk_kv.engines import Engine
from spdk_kv.errors import DeviceError, SpdkKvError


class DataFlush:
    """Flushes what was written to ``engine``. Not thread-safe: the committer's lock guards it.

    After a failed fsync the kernel may drop the pages that it could not write and call them clean:
    the next fsync succeeds, and the bytes are gone. It also reports a failure once. So on a file or
    block device of the kernel's a failure is final, also one that nobody waited for (Ctrl-C), and
    the store records nothing more until it is opened again. What was flushed before is safe.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._begun: list[Transfer] = []
        self._failure: SpdkKvError | None = None

    def check(self) -> None:
        """DeviceError where nothing can be made durable any more."""
        if self._failure is not None:
            raise DeviceError(
                f"an earlier flush of {self._engine.where} failed, and what was put or appended "
                "since the last one that succeeded may be lost, although reads still find it. "
                f"Close the store and open it again: it has what was flushed. ({self._failure})",
                op="flush",
                status=getattr(self._failure, "status", None),
            ) from self._failure

    def flush(self, timeout_s: float | None) -> None:
        """Blocks until what was written before is on the medium. On a file of the kernel's
        ``timeout_s`` has no effect: a flush that nobody waits for could fail unnoticed."""
        if not self._engine.failed_flush_is_final:
            self._engine.flush(timeout_s)
            return
        self._settle()
        self.check()
        transfer = self._engine.transfer(FLUSH)
        transfer.add(0, 0, 0)
        self._begun.append(transfer)
        try:
            self._engine.run(transfer)
        finally:
            self._note()

    def _settle(self) -> None:
        """Waits for flushes whose callers were interrupted twice."""
        for transfer in self._begun:
            if transfer.in_flight:
                transfer.wait()
        self._note()

    def _note(self) -> None:
        for transfer in list(self._begun):
            if transfer.in_flight:
                continue
            self._begun.remove(transfer)
            # Cancelled: an interrupt came before the command was given to the kernel.
            if transfer.done and transfer.status not in (0, errno.ECANCELED):
                failure = self._engine.error(transfer)
                assert isinstance(failure, SpdkKvError)
                self._failure = failure
