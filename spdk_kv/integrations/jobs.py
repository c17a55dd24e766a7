"""Batches of pages between a host's memory and a store, for hosts whose scheduler may not wait."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from spdk_kv.errors import ClosedError, SpdkKvError
from spdk_kv.integrations.pages import Page, bytes_of, get_pages, put_pages, said
from spdk_kv.integrations.waits import wait
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
    kind: Literal["put", "get", "exists"]
    pages: Sequence[Any]  # of the last kind, keys
    again: bool = True


class Jobs:
    """Jobs under way between a host and ``store``, which stays the caller's to close.

    No method but :meth:`drain` and :meth:`close` waits for the drive. :meth:`put`, :meth:`get` and
    :meth:`finished` wait for no other thread either: a scheduler that meets a lock gives the
    interpreter away, and gets it back when a worker is done with it. Thread-safe. Reads go before
    writes, and writes never take the last worker, so that one who waits for his prompt does not
    wait for what others leave behind. A job keeps its buffers until it has ended, and no longer.
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
        self._pid = os.getpid()
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
        self._begun: dict[int, tuple[_Job, float]] = {}
        self._drains: list[threading.Event] = []
        self._closed = False
        # One item for each job, and for each worker at the end: who finds nothing waits again.
        self._bell: SimpleQueue[None] = SimpleQueue()
        # Of workers only.
        self._choosing = threading.Lock()
        self._writing = 0
        self._most_writing = workers - 1
        self._threads: list[threading.Thread] = []
        try:
            for number in range(workers):
                thread = threading.Thread(
                    target=self._work, name=f"spdk_kv-jobs-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:  # the system may refuse one
            self.close()
            raise

    # -- what a host asks for -------------------------------------------------------------------

    def put(self, pages: Sequence[Page], *, again: bool = True) -> int:
        """As :func:`put_pages`. The buffers must stay unchanged until it has ended.

        Returns the job's number, as the others do, which all raise ClosedError after close, and in
        a process forked since.
        """
        job = _Job(self._number(), "put", pages, again)
        if self._most_pending is not None and len(self._open) > self._most_pending:
            reason = f"{self._most_pending} jobs are waiting"
            self._end(job, [False] * len(pages), 0, 0.0, reason)
        else:
            self._submit(job, self._puts)
        return job.number

    def get(self, pages: Sequence[Page]) -> int:
        """As :func:`get_pages`."""
        job = _Job(self._number(), "get", pages)
        self._submit(job, self._gets)
        return job.number

    def exists(self, keys: Sequence[str]) -> int:
        """Whether pages are stored under ``keys``: answered at once, unless the store is open
        ``read_only`` and may have to look at its index's disk."""
        if self._store.read_only:
            job = _Job(self._number(), "exists", keys)
            self._submit(job, self._gets)
            return job.number
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

    def drain(self) -> None:
        """Waits until every job has ended, as long as the drive takes; what takes long is said."""
        ended = threading.Event()
        self._drains.append(ended)

        def is_over(patience_s: float) -> bool:
            until = time.monotonic() + patience_s
            while True:
                ended.clear()
                if not self._open:
                    return True
                if not ended.wait(until - time.monotonic()):
                    return False

        try:
            wait(is_over, lambda: self._under_way("draining"))
        finally:
            self._drains.remove(ended)

    def close(self) -> None:
        """Waits for the jobs that were begun; the others end as failed. May be called twice.

        Waits as long as the drive takes, and says so: nobody can keep it from using the host's
        memory for what it was told to do, so that the host must not have that back before.
        """
        self._closed = True
        if os.getpid() != self._pid:
            # Forked: all of it is the parent's, and so is whom on_finished would tell.
            self._gets.clear()
            self._puts.clear()
            return
        self._give_up(_taken(self._gets))
        self._give_up(_taken(self._puts))
        for _ in self._threads:
            self._bell.put(None)
        others = [each for each in self._threads if each is not threading.current_thread()]

        def is_over(patience_s: float) -> bool:
            until = time.monotonic() + patience_s
            for thread in others:
                thread.join(max(0.0, until - time.monotonic()))
            return not any(thread.is_alive() for thread in others)

        wait(is_over, lambda: self._under_way("closing"))

    def _under_way(self, who: str) -> str:
        """What ``who`` waits for."""
        under_way = list(self._begun.values())
        if not under_way:
            return ""
        first, begun_s = under_way[0]
        took_s = time.monotonic() - begun_s
        return (
            f"{who} waits for the drive of {self._store.location}: {len(under_way)} jobs, the "
            f"first a {first.kind} of {len(first.pages)} pages, for {took_s:.0f} s"
        )

    # -- how it is done -------------------------------------------------------------------------

    def _number(self) -> int:
        """The next job's, which is open from now on."""
        if self._closed:
            raise ClosedError("closed: no job is taken any more")
        if os.getpid() != self._pid:
            raise ClosedError(f"process {self._pid} does these jobs, and this is a fork of it")
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
            self._end(job, [False] * len(job.pages), 0, 0.0, "closed before it was begun")

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
        begun, nbytes, error = time.perf_counter(), 0, None
        self._begun[job.number] = job, time.monotonic()
        try:
            ok, nbytes = self._done(job)
        except SpdkKvError as failure:
            ok, error = [False] * len(job.pages), str(failure)
        except BaseException as failure:  # a buffer that is none, say; a host waits for every job
            log.error("job %d: %s", job.number, said(failure, fully=True))
            ok, error = [False] * len(job.pages), f"{type(failure).__name__}: {failure}"
        finally:
            if job.kind == "put":
                with self._choosing:
                    self._writing -= 1
        self._end(job, ok, nbytes, time.perf_counter() - begun, error)

    def _done(self, job: _Job) -> tuple[list[bool], int]:
        """Does ``job``: what became of its pages, and how many bytes of them are sound."""
        if job.kind == "exists":
            return [size is not None for size in self._store.sizes(job.pages)], 0
        if job.kind == "put":
            ok = put_pages(self._store, job.pages, again=job.again)
        else:
            ok = get_pages(self._store, job.pages)
        pages = zip(job.pages, ok, strict=True)
        return ok, sum(bytes_of(page).nbytes for (_, page), sound in pages if sound)

    def _end(
        self, job: _Job, ok: list[bool], nbytes: int, seconds: float, error: str | None
    ) -> None:
        job.pages = ()  # the host has its memory back
        self._begun.pop(job.number, None)
        self._report(Finished(job.number, ok, nbytes, seconds, error))

    def _report(self, finished: Finished) -> None:
        self._ended.append(finished)
        self._open.discard(finished.job)
        for drain in tuple(self._drains):
            drain.set()
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
