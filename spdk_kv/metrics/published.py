"""The file by which the process that has a store open tells others what it counts.

``spdk-kv top`` and ``spdk-kv metrics`` run in other processes, while the store is locked by its
owner, and the counters are in the owner's memory. So the owner writes them down beside the lock, a
few kilobytes once a second.

It writes with pwrite, not through a mapping: where the filesystem is full, or somebody cut the file
off, a write fails, while a store into a mapping would kill the host by SIGBUS. The file is never
replaced while it is in use: a rename each second would make the filesystem write its journal.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from spdk_kv.errors import ClosedError, StoreMismatch
from spdk_kv.metrics.owner import is_alive, own_identity
from spdk_kv.metrics.sample import Sample

log = logging.getLogger(__name__)

FILE_NAME = "counters"
# Raised whenever a field changes its name or meaning, since the reader may be another version. What
# stands before it in the header never changes.
FORMAT = 1
_MAGIC = b"SPDKKVCO"
# Magic, format, CRC32 of all that follows; then the number of this writing, and bytes of JSON.
_HEAD = struct.Struct("<8sII")
_BODY = struct.Struct("<QI")
# Written in turn, so that one is whole at every moment, also where the writer is killed.
_SLOTS = 2
SLOT_NBYTES = 1 << 16
_INTERVAL_S = 1.0
# Written again this often where nothing changes: who watches sees that the owner is not stuck.
_HEARTBEAT_S = 10.0
# Waits are so many times as long as what was waited for took, so that it costs 0.5 % of a processor
# at most, however many sequences there are.
_LEAST_IDLE = 200
# Two heartbeats missed, and some for a busy machine.
STALE_S = 25.0

Take = Callable[[], "Sample | None"]


class Publisher:
    """Keeps the file in ``folder`` up to date with ``take()``, on a thread of its own. 0600.

    ``take`` returns None once there is nothing more to tell, which ends it. The file is not synced:
    nobody reads it after a crash. What fails is logged only, and the store goes on. Does nothing
    where there is no folder, before :meth:`start`, and in a child after fork.
    """

    def __init__(self, folder: str | None, take: Take, *, interval_s: float = _INTERVAL_S) -> None:
        self.path = None if folder is None else os.path.join(folder, FILE_NAME)
        self._take = take
        self._interval_s = interval_s
        self._owner = own_identity()
        self._fd = -1
        self._count = 0
        self._last: Sample | None = None
        self._looked_s: float | None = None
        self._wait_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to tell. Called once, by the owner of the folder."""
        if self.path is None:
            return
        self._remove()  # a killed owner's
        thread = threading.Thread(target=self._run, name="spdk_kv-counters", daemon=True)
        try:
            thread.start()
        except RuntimeError as refused:  # no more threads: a store is of use all the same
            log.debug("%s is not written: %s", self.path, refused)
        else:
            self._thread = thread

    def close(self) -> None:
        """Stops writing and removes the file. May be called twice."""
        if self._thread is None or os.getpid() != self._owner["pid"]:
            return
        self._stop.set()
        # A garbage collection on that thread may be what closes a forgotten store.
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._end()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.thread_time()
                if not self._tell():
                    break
                took_s = time.thread_time() - began
                self._wait_s = max(self._interval_s, _LEAST_IDLE * took_s)
                self._stop.wait(self._wait_s)
        finally:
            self._end()

    def _tell(self) -> bool:
        """Returns whether there will be more to tell."""
        try:
            sample = self._take()
            if sample is None:
                return False
            last = self._last
            if last is None or (
                not sample.same_activity(last) or sample.clock_s - last.clock_s >= _HEARTBEAT_S
            ):
                self._write(sample)
                self._last = sample
            self._looked_s = sample.clock_s
        except ClosedError:
            return False
        except OSError as refused:  # a full disk must not disturb anybody
            log.debug("%s is not written: %s", self.path, refused)
        except Exception:  # nor end this thread, which would leave old numbers there
            log.exception("%s is not written", self.path)
        return True

    def _write(self, sample: Sample) -> None:
        if self._stop.is_set() or self.path is None:
            return
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
            os.fchmod(self._fd, 0o600)  # whatever the umask
        told = {
            "owner": self._owner,
            "looked_s": self._looked_s,
            "wait_s": self._wait_s,
            **sample.to_json(),
        }
        slot = encode(told, self._count + 1)
        os.pwrite(self._fd, slot, (self._count + 1) % _SLOTS * SLOT_NBYTES)
        self._count += 1

    def _end(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._remove()

    def _remove(self) -> None:
        if self.path is not None:
            with suppress(OSError):
                os.unlink(self.path)


def encode(told: dict[str, Any], number: int) -> bytes:
    """A slot of the file. Sequences are left out where there is no room for them."""
    while True:
        text = json.dumps(told, separators=(",", ":")).encode()
        room = SLOT_NBYTES - _HEAD.size - _BODY.size
        if len(text) <= room or not told["sequences"]:
            break
        told = {**told, "sequences": told["sequences"][: len(told["sequences"]) // 2]}
    if len(text) > room:
        raise OSError(f"{len(text)} bytes of counters do not fit into {room}")
    body = _BODY.pack(number, len(text)) + text
    return _HEAD.pack(_MAGIC, FORMAT, zlib.crc32(body)) + body


@dataclass(frozen=True)
class Reading:
    """What the file told.

    ``number`` counts the writings; ``pid``: whose sample it is. ``age_s``: how long ago the owner
    wrote it, which is more than STALE_S where that is stuck. ``looked_s``: the time of the look
    before, by the clock of the sample; None if there was none. Looks that find nothing new write
    nothing, so between this and the writing before nothing had happened then. ``wait_s``: how long
    it is until the next look.
    """

    sample: Sample
    number: int
    pid: int
    age_s: float
    looked_s: float | None
    wait_s: float

    @property
    def is_stale(self) -> bool:
        """Whether the owner should have written again since."""
        return self.age_s > STALE_S


def read_published(folder: str, owner: int | None) -> Reading | None:
    """What the owner of the store whose index and lock are in ``folder`` counted last.

    Args:
        folder: where they are.
        owner: the process that holds the lock, as this process sees it. What another one left is
            ignored; but where the writer is in another container, so that its number says nothing
            here, it counts as alive as long as it writes.

    Returns:
        None if nothing is told by a process that has the store open.

    Raises:
        StoreMismatch: another version of spdk_kv wrote the file.
        PermissionError: It is another user's.
    """
    slots = _read_slots(os.path.join(folder, FILE_NAME))
    decoded = [found for slot in slots if (found := _decode(slot)) is not None]
    if not decoded:
        others = {_HEAD.unpack_from(slot)[1] for slot in slots if slot.startswith(_MAGIC)}
        if owner is not None and others - {FORMAT}:
            raise StoreMismatch(
                f"process {owner}, which has the store open, runs another version of spdk_kv (its "
                f"file of counters has format {max(others)}, this version reads {FORMAT}); ask "
                "with that version"
            )
        return None
    number, told = max(decoded, key=lambda each: each[0])
    try:
        reading = _reading(number, told)
        alive = is_alive(told["owner"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if alive is None:
        return None if reading.is_stale else reading
    return reading if alive and reading.pid == owner else None


def _reading(number: int, told: Mapping[str, Any]) -> Reading:
    sample = Sample.from_json(told)
    looked_s = told["looked_s"]
    return Reading(
        sample=sample,
        number=number,
        pid=int(told["owner"]["pid"]),
        age_s=max(0.0, time.time() - sample.time_s),
        looked_s=None if looked_s is None else float(looked_s),
        wait_s=float(told["wait_s"]),
    )


def _read_slots(path: str) -> list[bytes]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        slots = [os.pread(fd, SLOT_NBYTES, number * SLOT_NBYTES) for number in range(_SLOTS)]
    except IsADirectoryError:
        return []
    finally:
        os.close(fd)
    return [slot for slot in slots if len(slot) >= _HEAD.size + _BODY.size]


def _decode(slot: bytes) -> tuple[int, dict[str, Any]] | None:
    """(number of the writing, what was told); None where it is not whole, or of another format."""
    magic, version, crc = _HEAD.unpack_from(slot)
    number, nbytes = _BODY.unpack_from(slot, _HEAD.size)
    body = slot[_HEAD.size : _HEAD.size + _BODY.size + nbytes]
    if magic != _MAGIC or version != FORMAT or zlib.crc32(body) != crc:
        return None
    try:
        told = json.loads(body[_BODY.size :])
    except ValueError:
        return None
    return (number, told) if isinstance(told, dict) else None
