"""Batches of pages between a host's memory and a store, for hosts whose scheduler may not wait."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Literal, TypeVar

from spdk_kv.errors import ClosedError, SpdkKvError
from spdk_kv.integrations.pages import Page, bytes_of, get_pages, put_pages
from spdk_kv.store import KVStore

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """The end of a job.

    ``ok``: for each page, or key, whether it is stored, read, there, or was deleted.
    ``nbytes``: of the pages that are ``ok``. ``seconds``: that it took, without the time in which
    it waited for others. ``error``: why nothing of it was done; None otherwise.
    """

    job: int
    ok: list[bool]
    nbytes: int
    seconds: float
    error: str | None = None


@dataclass(eq=False)
class _Job:
    number: int
    kind: Literal["put", "get"]
    pages: Sequence[Page]
    again: bool = True


class Jobs:
    """Jobs under way between a host and ``store``, which stays the caller's to close.

    No method but :meth:`close` waits for the drive. :meth:`put`, :meth:`get` and :meth:`finished`
    wait for no other thread either: a scheduler that meets a lock gives the interpreter away, and
    gets it back when a worker is done with it. Thread-safe. Reads go before writes, and writes
    never take the last worker, so that one who waits for his prompt does not wait for what others
    leave behind. A job keeps its buffers until it has ended, and no longer.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        on_finished: Callable[[], None] | None = None,
        workers: int = 4,
        most_pending: int | None = None,
    ) -> None:
        """
        Args:
            store: Where to and from.
            on_finished: Called after each end of a job, on whichever thread that was.
            workers: Threads, two at least, each of which does one job at a time.
            most_pending: How many jobs may be unfinished before a put is declined: it ends at
                once, as failed. None declines nothing.
        """
        if workers < 2:
            raise ValueError(f"workers={workers}: two at least, one of them for reads alone")
        self._store = store
        self._on_finished = on_finished
        self._most_pending = most_pending
        # What a caller touches is changed by single operations of built-in types alone, each of
        # which is done or not done for every thread.
        self._numbers = count(1)
        self._gets: deque[_Job] = deque()
        self._puts: deque[_Job] = deque()
        self._ended: deque[Finished] = deque()
        self._open: set[int] = set()
        self._closed = False
        # One item for each job, and for each worker at the end: who finds nothing waits again.
        self._bell: SimpleQueue[None] = SimpleQueue()
        # Of workers only.
        self._choosing = threading.Lock()
        self._writing = 0
        self._most_writing = workers - 1
        self._threads = [
            threading.Thread(target=self._work, name=f"spdk_kv-jobs-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    # -- what a host asks for -------------------------------------------------------------------

    def put(self, pages: Sequence[Page], *, again: bool = True) -> int:
        """As :func:`put_pages`. The buffers must stay unchanged until it has ended.

        Returns the job's number, as the others do, which all raise ClosedError after close.
        """
        job = _Job(self._number(), "put", pages, again)
        if self._most_pending is not None and len(self._open) > self._most_pending:
            reason = f"{self._most_pending} jobs are waiting"
            self._end(job, [False] * len(pages), 0.0, reason)
        else:
            self._submit(job, self._puts)
        return job.number

    def get(self, pages: Sequence[Page]) -> int:
        """As :func:`get_pages`."""
        job = _Job(self._number(), "get", pages)
        self._submit(job, self._gets)
        return job.number

    def exists(self, keys: Sequence[str]) -> int:
        """Whether pages are stored under ``keys``, which is known without the drive."""
        return self._answer(lambda: [size is not None for size in self._store.sizes(keys)], keys)

    def delete(self, keys: Sequence[str]) -> int:
        """Forgets what is stored under ``keys``; ``ok`` says where there was something."""
        return self._answer(lambda: [self._store.delete(key) for key in keys], keys)

    def finished(self) -> list[Finished]:
        """What has ended since the last call, in that order."""
        return list(_taken(self._ended))

    @property
    def pending(self) -> int:
        """How many jobs have not ended."""
        return len(self._open)

    def close(self) -> None:
        """Waits for the jobs that were begun; the others end as failed. May be called twice."""
        self._closed = True
        self._give_up(_taken(self._gets))
        self._give_up(_taken(self._puts))
        for _ in self._threads:
            self._bell.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # -- how it is done -------------------------------------------------------------------------

    def _number(self) -> int:
        """The next job's, which is open from now on."""
        if self._closed:
            raise ClosedError("closed: no job is taken any more")
        number = next(self._numbers)
        self._open.add(number)
        return number

    def _submit(self, job: _Job, queue: deque[_Job]) -> None:
        queue.append(job)
        self._bell.put(None)
        # Closed meanwhile: either of the two sees the job, and only one takes it.
        if self._closed:
            with suppress(ValueError):
                queue.remove(job)
                self._give_up([job])

    def _give_up(self, jobs: Iterable[_Job]) -> None:
        for job in jobs:
            self._end(job, [False] * len(job.pages), 0.0, "closed before it was begun")

    def _answer(self, ask: Callable[[], list[bool]], keys: Sequence[str]) -> int:
        number = self._number()
        begun, error = time.perf_counter(), None
        try:
            ok = ask()
        except SpdkKvError as failure:
            ok, error = [False] * len(keys), str(failure)
        self._report(Finished(number, ok, 0, time.perf_counter() - begun, error))
        return number

    def _next(self) -> _Job | None:
        """The job to do now, if there is one for another worker."""
        with self._choosing:
            for job in _taken(self._gets):
                return job
            if self._writing < self._most_writing:
                for job in _taken(self._puts):
                    self._writing += 1
                    return job
        return None

    def _work(self) -> None:
        while True:
            # Also what nobody came for while the writers were enough: before waiting again.
            while (job := self._next()) is not None:
                self._do(job)
            if self._closed:
                return
            self._bell.get()

    def _do(self, job: _Job) -> None:
        begun, error = time.perf_counter(), None
        try:
            if job.kind == "put":
                ok = put_pages(self._store, job.pages, again=job.again)
            else:
                ok = get_pages(self._store, job.pages)
        except Exception as failure:  # a buffer that is none; a host waits for every job
            log.exception("job %d", job.number)
            ok, error = [False] * len(job.pages), f"{type(failure).__name__}: {failure}"
        finally:
            if job.kind == "put":
                with self._choosing:
                    self._writing -= 1
        self._end(job, ok, time.perf_counter() - begun, error)

    def _end(self, job: _Job, ok: list[bool], seconds: float, error: str | None) -> None:
        nbytes = sum(
            bytes_of(buffer).nbytes
            for (_, buffer), sound in zip(job.pages, ok, strict=True)
            if sound
        )
        job.pages = ()  # the host has its memory back
        self._report(Finished(job.number, ok, nbytes, seconds, error))

    def _report(self, finished: Finished) -> None:
        self._ended.append(finished)
        self._open.discard(finished.job)
        if self._on_finished is not None:
            try:
                self._on_finished()
            except Exception:  # or no job after this one would end
                log.exception("telling the host of job %d", finished.job)


def _taken(queue: deque[T]) -> Iterator[T]:
    """Takes what is in ``queue``, one by one as it is asked for."""
    with suppress(IndexError):
        while True:
            yield queue.popleft()
