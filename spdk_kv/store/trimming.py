"""Free space goes back to the filesystem (holes, the file's end) or is trimmed on the drive.

In the background as far as it is not about to be used again: a store that puts and deletes all the
time keeps what it needs for that. Each part is reserved while it is given back, so that no put has
bytes there; puts and gets wait for nothing here, unless there is no other room.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, wait

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import ClosedError, DeviceError, DeviceTimeout, SpdkKvError
from spdk_kv.placement import DATA_START
from spdk_kv.store.backing import Backing
from spdk_kv.store.committer import Committer, nothing
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.records import Records
from spdk_kv.store.reserved import Reserved
from spdk_kv.units import MIB, align_down, align_up

log = logging.getLogger(__name__)

# How often the background looks, once something came free, until all of that was given back.
TICK_S = 1.0
# What is given back at once, while nobody can be given it. Reads and writes of a file wait for the
# filesystem meanwhile: with ext4 on a virtual disk 4 ms for this much, and 35 ms for 256 MiB.
_PART_NBYTES = 32 * MIB
# Smaller runs stay: in a file each is an entry of its map, and a command each on a drive.
LEAST_NBYTES = 64 << 10
_LEAST_WHILE_BUSY_NBYTES = MIB
# So that a drive that is busy with puts is not kept from them for long.
_MOST_WHILE_BUSY_NBYTES = 1 << 30
_MORE_PASSES = 8
# How long the last one may take, when the store is closed.
_LAST_S = 5.0
# A closing store waits this much longer for what the filesystem does not finish.
_CLOSE_TIMEOUT_S = 30.0


class Reserve:
    """How much free space stays as it is, because it will be used again soon: twice what was used
    between two looks, halved from look to look."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._taken_nbytes = 0

    def look(self, taken_nbytes: int) -> int:
        """``taken_nbytes``: what was ever handed out. Returns how much is to stay."""
        fresh, self._taken_nbytes = taken_nbytes - self._taken_nbytes, taken_nbytes
        self.nbytes = max(2 * fresh, self.nbytes // 2)
        if self.nbytes < MIB:
            self.nbytes = 0
        return self.nbytes


class Trimmer:
    """Gives free space of one store back. Thread-safe.

    ``automatic``: in the background after commits that free something, and when the store is
    closed. All is done on one thread, so that an interrupt (Ctrl-C) ends a caller's wait only.
    """

    def __init__(
        self,
        records: Records,
        committer: Committer,
        backing: Backing,
        reserved: Reserved,
        automatic: bool,
    ) -> None:
        self._records = records
        self._committer = committer
        self._backing = backing
        self._reserved = reserved
        self._automatic = automatic
        self._reserve = Reserve()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._jobs: list[tuple[Future[int], int]] = []
        self._is_fresh = False
        self._is_closing = False
        self._refused = False
        self.given_nbytes = 0
        """What was given back since the store was opened."""

    # -- for callers ----------------------------------------------------------------------------

    def freed(self) -> None:
        """A commit freed something. Does not block."""
        if not self._automatic or self._refused or self._is_fresh:
            return
        with self._wake:
            self._is_fresh = True
            self._start()

    def trim(self, least_nbytes: int = BLOCK_NBYTES, deadline: Deadline = NEVER) -> int:
        """Blocks until all that is free now, in runs of ``least_nbytes`` or more, was given back;
        returns how many bytes those came to. DeviceTimeout past ``deadline``; it goes on by itself
        then. DeviceError where the drive refused."""
        asked: Future[int] = Future()
        with self._wake:
            if self._is_closing:
                raise ClosedError("the store is being closed")
            self._jobs.append((asked, least_nbytes))
            self._start()
        wait([asked], deadline.left_s())
        if not asked.done():
            raise deadline.error("giving space back to the drive")
        return asked.result()

    def trim_for_flush(self, deadline: Deadline) -> None:
        """As :meth:`trim`, but for the smallest runs. A drive that takes nothing back is logged,
        and left alone from then on."""
        if self._refused:
            return
        try:
            self.trim(LEAST_NBYTES, deadline)
        except DeviceTimeout:
            raise
        except DeviceError as refused:
            self._give_up(refused)

    def close(self) -> None:
        """Ends the thread, after a last trimming (5 s of it at most) if that is automatic."""
        with self._wake:
            self._is_closing = True
            if self._automatic and not self._refused:
                self._start()
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_TIMEOUT_S)
        self._committer.on_freed = nothing  # no circle that would keep the drive's memory

    # -- the thread -----------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="spdk_kv-trim", daemon=True)
            thread.start()
            self._thread = thread
        self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._is_fresh or self._is_closing):
                    self._wake.wait()
                if not self._jobs and not self._is_closing:
                    self._wake.wait(TICK_S)
                jobs, self._jobs = self._jobs, []
                is_closing = self._is_closing
            for asked, least_nbytes in jobs:
                self._answer(asked, least_nbytes)
            if is_closing:
                if self._automatic and not self._refused:
                    self._try(LEAST_NBYTES, 0, time.monotonic() + _LAST_S)
                return
            if self._is_fresh and not jobs:
                self._look()

    def _answer(self, asked: Future[int], least_nbytes: int) -> None:
        try:
            if least_nbytes == BLOCK_NBYTES and self._backing.engine.file_nbytes is None:
                self._backing.forget_given()
            given = more = self._give_back(least_nbytes, 0, None)
            for _ in range(_MORE_PASSES):  # where puts took a part of a run meanwhile
                if not more:
                    break
                more = self._give_back(least_nbytes, 0, None)
                given += more
        except BaseException as failure:  # raised again by whoever waits for it
            asked.set_exception(failure)
        else:
            asked.set_result(given)

    def _rest(self, took_s: float) -> None:
        """In the background half of the time is left to others."""
        with self._wake:
            if not self._jobs and not self._is_closing:
                self._wake.wait(took_s)

    def _look(self) -> None:
        kept = self._reserve.look(self._backing.taken_nbytes)
        # Before the work: what is freed from now on is for another look.
        self._is_fresh = kept > 0
        waits = self._reserved.waits
        self._try(_LEAST_WHILE_BUSY_NBYTES if kept else LEAST_NBYTES, kept, None)
        if self._reserved.waits != waits:
            self._is_fresh = True

    def _try(self, least_nbytes: int, kept_nbytes: int, until: float | None) -> None:
        try:
            self._give_back(least_nbytes, kept_nbytes, until, self._reserved.waits)
        except SpdkKvError as refused:
            self._give_up(refused)
        except BaseException:
            log.exception("giving free space back")
            self._refused, self._is_fresh = True, False

    def _give_up(self, refused: SpdkKvError) -> None:
        log.warning("free space is not given back any more: %s", refused)
        self._refused, self._is_fresh = True, False

    # -- the work -------------------------------------------------------------------------------

    def _give_back(
        self, least_nbytes: int, kept_nbytes: int, until: float | None, waits: int | None = None
    ) -> int:
        """``kept_nbytes`` of what is free stay. Past ``until`` (of the monotonic clock) the rest
        stays, too, and where somebody had to wait after there had been ``waits``."""
        records, allocator = self._records, self._records.extents.allocator
        with records.lock:
            left = self._backing.owed_nbytes(allocator) - kept_nbytes
            gaps = [] if left < least_nbytes else list(allocator.gaps_below(1 << 63, least_nbytes))
        if kept_nbytes:
            left = min(left, _MOST_WHILE_BUSY_NBYTES)
        if not gaps:
            return 0
        given = self._cut(least_nbytes, left if kept_nbytes else None)
        left -= given
        # The largest runs are used last: an extent comes from the shortest that holds it, and from
        # its beginning. So they are given back from their ends.
        for run, run_end in sorted(gaps, key=lambda gap: gap[0] - gap[1]):
            for start, end in reversed(self._backing.owed(run, run_end)):
                if end - start < least_nbytes:
                    continue
                for stop in range(end, start, -_PART_NBYTES):
                    if until is not None and time.monotonic() > until:
                        return given
                    if waits is not None and self._reserved.waits != waits:
                        return given
                    if kept_nbytes and left < least_nbytes:
                        return given
                    part = max(start, stop - _PART_NBYTES)
                    if kept_nbytes:
                        part = max(part, stop - align_down(left, BLOCK_NBYTES))
                    began = time.monotonic()
                    given += self._punch(run_end, part, stop)
                    left -= stop - part
                    if waits is not None and until is None:
                        self._rest(time.monotonic() - began)
        return given

    def _punch(self, run_end: int, start: int, end: int) -> int:
        """Gives what is free of ``[start, end)``, within the free run that ends at ``run_end``,
        back; returns how many bytes that came to."""
        with self._records.lock:
            run = run_end - self._records.extents.allocator.gap_before(run_end)
            start = max(start, run)  # puts may have taken the beginning
            if start >= end or not self._reserved.take(run, start, end - start):
                return 0
        try:
            # The drive knows of the commit that let go of them: an older copy of the index is
            # refused, instead of naming bytes that are gone.
            self._committer.settle()
            before = self._backing.engine.stored_nbytes
            punched = self._backing.engine.discard(start, end - start)
            self._backing.gave(start, end, punched)
        finally:
            self._reserved.give_back(start)
        return self._count(end - start if punched else 0, before)

    def _cut(self, least_nbytes: int, most_nbytes: int | None) -> int:
        """Cuts the free end of the data file off, ``most_nbytes`` of it at most."""
        size = self._backing.engine.file_nbytes
        if size is None:
            return 0
        allocator = self._records.extents.allocator
        with self._records.lock:
            nbytes = allocator.gap_before(allocator.end)
            start = max(DATA_START, allocator.end - nbytes)
            end = start if most_nbytes is None else max(start, size - most_nbytes)
            end = align_up(end, BLOCK_NBYTES)
            if size - end < least_nbytes or not self._reserved.take(start, start, nbytes):
                return 0
        try:
            self._committer.settle()
            before = self._backing.engine.stored_nbytes
            for step in range(size - _PART_NBYTES, end, -_PART_NBYTES):
                self._backing.cut(step)
            self._backing.cut(end)
        finally:
            self._reserved.give_back(start)
        return self._count(size - end, before)

    def _count(self, nbytes: int, before: int | None) -> int:
        """What giving ``nbytes`` back came to. A file may have had no blocks there."""
        after = self._backing.engine.stored_nbytes
        if before is not None and after is not None:
            nbytes = max(0, min(nbytes, before - after))
        self.given_nbytes += nbytes
        return nbytes
