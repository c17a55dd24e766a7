"""The engine contract: what moves bytes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import DISCARD, FLUSH, Queue, Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines.failures import op_name, transfer_error
from spdk_kv.engines.futures import Callbacks
from spdk_kv.errors import ClosedError, DeviceTimeout, EngineUnavailable

T = TypeVar("T")


class Link(Protocol):
    """The way between host memory and a GPU's: CudaLink, or EmulatedLink where there is none.

    ``capsule`` is for transfers. ``register(memory)`` makes host memory (``address``, ``nbytes``)
    reachable as long as what it returns lives; OSError. ``explain(code)`` has the words for the
    code of a failed copy. ``copy_time_s(nbytes, to_device)``: what a lone copy takes.
    """

    @property
    def name(self) -> str: ...
    @property
    def capsule(self) -> Any: ...
    def register(self, memory: Any) -> Any: ...
    def explain(self, code: int) -> str: ...
    def copy_time_s(self, nbytes: int, to_device: bool = True) -> float: ...


def block_geometry(block_nbytes: int, nbytes: int) -> str:
    """:attr:`Engine.geometry` of a namespace, whichever engine reaches it."""
    return f"{nbytes // block_nbytes} blocks of {block_nbytes} bytes"


@dataclass(frozen=True)
class QueueOptions:
    """How an engine's queues are set up.

    ``depth``: commands kept in flight on each. ``segment_nbytes``: the largest command, a multiple
    of 4096. ``hugepages``: memory for transfers is on transparent hugepages where there are some.
    ``queue_pairs``: queues that transfers are dealt out to, each with a thread and bounce memory
    of its own; more than one is for the engine `spdk` alone.
    """

    depth: int = 16
    segment_nbytes: int = 1 << 20
    hugepages: bool = True
    queue_pairs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 4096:
            raise ValueError(f"depth is 1 to 4096, not {self.depth}")
        if not 1 <= self.queue_pairs <= 64:
            raise ValueError(f"queue_pairs is 1 to 64, not {self.queue_pairs}")
        if not 4096 <= self.segment_nbytes <= 1 << 30 or self.segment_nbytes % 4096:
            raise ValueError(
                f"segment_nbytes is a multiple of 4096 up to 1 GiB, not {self.segment_nbytes}"
            )


class Engine:
    """One drive or file, and the queue that reaches it. Thread-safe.

    A subclass opens the drive, then calls :meth:`_start`. Attributes: ``name``; ``where`` (for
    messages); ``direct`` (past the page cache); ``block_nbytes`` (offsets of writes are multiples
    of it) and ``align_nbytes`` (of addresses, to go without a copy); ``segment_nbytes`` (the
    largest command); ``persistent`` (bytes outlive the process); ``keeps_bytes`` (false for null);
    ``failed_flush_is_final`` (after a flush that failed another may succeed, and bytes be lost).
    """

    name = ""
    direct = False
    persistent = True
    keeps_bytes = True
    failed_flush_is_final = False

    def __init__(self, where: str, options: QueueOptions) -> None:
        self.where = where
        self.options = options
        self.block_nbytes = 1
        self.align_nbytes = 1
        self.segment_nbytes = options.segment_nbytes
        self._pid = os.getpid()
        self._closed = False
        self._is_released = False
        self._queue: Queue | None = None
        self._slots: Any = None
        self._links: list[Link] = []
        self._reaper: threading.Thread | None = None
        self._callbacks = Callbacks(f"spdk_kv-{self.name}-callbacks")
        self._lock = threading.Lock()
        self._close_lock = threading.RLock()

    # -- opening and closing --------------------------------------------------------------------

    def _start(self, backend: Any, keep: object, lone: Any = None) -> None:
        """Starts the queue over ``backend`` (a capsule), once the geometry is set.

        ``lone``: the capsule of another backend on the same drive. With one, a caller that waits
        for a small transfer submits it itself where the queue is idle.
        """
        slots: list[int] = []
        lone_slots: list[int] = []
        if self.align_nbytes > 1 or self.block_nbytes > 1:
            slots = self._allocate_slots(0 if lone is None else 1)
            if lone is not None:
                lone_slots = [slots.pop()]
        made: dict[str, Any] = {
            "depth": self.options.depth,
            "segment_nbytes": self.segment_nbytes,
            "block_nbytes": self.block_nbytes,
            "align_nbytes": self.align_nbytes,
            "pid": self._pid,
        }
        kept, alone = (keep, self._slots), None
        if lone is not None:
            alone = Queue(lone, kept, slots=lone_slots, exclusive=True, **made)
        self._queue = Queue(backend, kept, slots=slots, lone=alone, **made)

    def _allocate_slots(self, more: int = 0) -> list[int]:
        # Twice the depth: while one half is copied out of, the drive fills the other.
        count = 2 * self.options.depth + more
        self._slots = self.allocate(count * self.segment_nbytes)
        return [self._slots.address + i * self.segment_nbytes for i in range(count)]

    def use_link(self, link: Link) -> None:
        """Makes the slots reachable for ``link``; a transfer over it does this by itself, once.

        Takes memory where the engine had no slots yet. EngineUnavailable where ``link`` cannot
        reach it.
        """
        queue = self.queue
        with self._lock:
            if link in self._links:
                return
            fresh = [] if queue.slots else self._allocate_slots()
            try:
                queue.keep(link.register(self._slots))
            except OSError as refused:
                raise EngineUnavailable(
                    f"the {link.name} link does not reach the {self._slots.nbytes} bytes of "
                    f"staging memory of {self.where}: {refused}"
                ) from refused
            if fresh:
                queue.add_slots(fresh)
            self._links.append(link)

    @property
    def queue(self) -> Queue:
        """The native queue. ClosedError after close, and in a process forked after open."""
        queue = self._queue  # once: another thread may be closing it
        if self._closed or queue is None:
            raise ClosedError(f"the {self.name} engine of {self.where} is closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the {self.name} engine of {self.where} was opened by process {self._pid} and "
                "cannot be used after a fork: open it in the child"
            )
        return queue

    @property
    def queues(self) -> list[Queue]:
        """All queues that transfers are dealt out to. ClosedError, as :attr:`queue`."""
        return [self.queue]

    def close(self, timeout_s: float = 30.0) -> None:
        """Waits for what is in flight and gives the drive back. May be called twice: a second call
        finishes what an interrupt (Ctrl-C) left.

        Args:
            timeout_s: How long to wait, in seconds.

        Raises:
            DeviceTimeout: The drive does not let go in time. Its memory is then never reused.
        """
        self._closed = True
        if os.getpid() != self._pid:
            self._queue = None
            return
        with self._close_lock:
            if self._is_released:
                return
            self._close_queue(timeout_s)
            self._links.clear()
            self._release()
            self._is_released = True

    def _close_queue(self, timeout_s: float) -> None:
        queue = self._queue
        if queue is None:
            return
        ended = queue.close(timeout_s)
        if self._reaper is not None:
            self._reaper.join()
        while done := queue.reap():
            self._resolve(done)
        self._callbacks.close(timeout_s)
        self._queue = None
        if not ended:
            self._is_released = True
            raise DeviceTimeout(
                f"{self.where} still holds memory {timeout_s:g} s after close", op="close"
            )

    def _release(self) -> None:
        """Closes descriptors; nothing is in flight any more."""

    # -- memory ---------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Any:
        """Memory that the drive reaches without a copy: an object with ``address`` and
        ``nbytes``, freed with its last reference. Raises MemoryError."""
        return Region(nbytes, self.options.hugepages)

    # -- transfers ------------------------------------------------------------------------------

    def transfer(
        self,
        op: int,
        *,
        checksum: bool = False,
        chunk_nbytes: int = 0,
        segment_nbytes: int = 0,
        window: int = 0,
        plan: int = 0,
        link: Link | None = None,
        stream: int | None = None,
        hand_over: bool = False,
    ) -> Transfer:
        """An empty transfer on this engine's queue; see :class:`Transfer`.

        With ``link`` its addresses are a GPU's; the first such transfer registers the engine's
        slots, which takes a while, or EngineUnavailable.
        """
        if link is None and not (segment_nbytes or window or hand_over):
            return Transfer(self.queue, op, checksum=checksum, chunk_nbytes=chunk_nbytes)
        if link is not None:
            self.use_link(link)
        return Transfer(
            self.queue,
            op,
            checksum=checksum,
            chunk_nbytes=chunk_nbytes,
            segment_nbytes=segment_nbytes,
            window=window,
            plan=plan,
            link=link,
            stream=stream,
            hand_over=hand_over,
        )

    def run(self, transfer: Transfer, timeout_s: float | None = None) -> None:
        """Submits ``transfer``, blocks until it is done, and raises its error if it failed."""
        status = transfer.run(timeout_s)
        if status:
            raise self.error(transfer)

    def wait(self, transfer: Transfer, deadline: Deadline = NEVER) -> None:
        """Blocks until a submitted transfer is done, and raises its error if it failed.

        Past ``deadline`` (DeviceTimeout), and after an interrupt, the transfer goes on.
        """
        status = transfer.wait(deadline.left_s())
        if status is None:
            raise deadline.error(f"{op_name(transfer.op)} on {self.where}")
        if status:
            raise self.error(transfer)

    def start(
        self,
        transfer: Transfer,
        finish: Callable[[Transfer], T],
        *,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> Future[T]:
        """Submits ``transfer`` and returns a future at once.

        ``finish(transfer)`` runs on the engine's reaper thread when it is over, also when it
        failed; its result or exception becomes the future's. It must not wait for a future;
        callbacks of the future may, since they run on another thread.
        """
        future: Future[T] = self._callbacks.future()
        future.set_running_or_notify_cancel()
        transfer.on_done = (future, finish)
        with self._lock:
            if self._reaper is None:
                self._reaper = threading.Thread(
                    target=self._reap, args=(self.queue,), name=f"spdk_kv-{self.name}", daemon=True
                )
                self._reaper.start()
        transfer.submit(timeout_s, priority, True)
        return future

    def _reap(self, queue: Queue) -> None:
        while done := queue.reap():
            self._resolve(done)
            done.clear()  # or the last ones, and their memory, would live until the next

    @staticmethod
    def _resolve(done: list[Transfer]) -> None:
        for transfer in done:
            future, finish = transfer.on_done
            transfer.on_done = None
            try:
                result = finish(transfer)
            except BaseException as failure:  # raised again by whoever waits for the future
                future.set_exception(failure)
            else:
                future.set_result(result)

    def error(self, transfer: Transfer) -> Exception:
        """The typed error for a transfer that ended with a status."""
        return transfer_error(transfer, self.where)

    # -- the drive ------------------------------------------------------------------------------

    def flush(self, timeout_s: float | None = None) -> None:
        """Blocks until everything written before is on the medium."""
        transfer = self.transfer(FLUSH)
        transfer.add(0, 0, 0)
        self.run(transfer, timeout_s)

    def discard(self, offset: int, nbytes: int, timeout_s: float | None = None) -> bool:
        """Marks a range as unused (TRIM, or a hole in a file). Blocks until it is done.

        Does nothing, and returns False, where neither the filesystem nor the drive supports it.
        """
        transfer = self.transfer(DISCARD)
        transfer.add(offset, 0, nbytes)
        status = transfer.run(timeout_s)
        if status not in (0, errno.EOPNOTSUPP):
            raise self.error(transfer)
        return status == 0

    def ensure(self, nbytes: int, limit_nbytes: int | None = None, index_nbytes: int = 0) -> None:
        """Grows the file to at least ``nbytes``; CapacityError where it cannot.

        It grows in steps, but never beyond ``limit_nbytes`` (None: there is no limit), and leaves
        ``index_nbytes`` of the filesystem for the index to grow.
        """

    def growable_to(self, index_nbytes: int = 0) -> int | None:
        """How far :meth:`ensure` could grow the file now, in bytes; None where nothing grows."""
        return None

    def back(self, offset: int, nbytes: int, index_nbytes: int = 0) -> None:
        """Gets the filesystem's blocks for a range of the file in which there may be holes, so that
        no write to it fails for want of them. CapacityError where they, and ``index_nbytes`` for
        the index to grow, are not there."""

    def shrink(self, nbytes: int) -> None:
        """Cuts off what a file has beyond ``nbytes``. Blocks on the filesystem."""

    @property
    def file_nbytes(self) -> int | None:
        """How far the data file reaches; None where there is none."""
        return None

    @property
    def stored_nbytes(self) -> int | None:
        """What the data file takes of its filesystem; None where there is none."""
        return None

    @property
    def capacity_nbytes(self) -> int | None:
        """The drive's size in bytes, or None where a file grows."""
        return None

    @property
    def identity(self) -> str:
        """What distinguishes this drive from others (serial, namespace), or ""."""
        return ""

    @property
    def geometry(self) -> str:
        """What of the drive's form may not change below a store (block size, size), or ""."""
        return ""

    @property
    def depth(self) -> int:
        """Segments kept in flight; may be set."""
        return int(self.queue.depth)

    @depth.setter
    def depth(self, depth: int) -> None:
        self.queue.depth = depth

    @property
    def written_nbytes(self) -> int:
        """Bytes that were written, of :meth:`stats`, which takes longer."""
        return sum(queue.written_nbytes for queue in self.queues)

    def stats(self) -> dict[str, Any]:
        """The queue's counters, times in nanoseconds (see :meth:`Queue.stats`), and
        ``depth_achieved``: segments in flight on average while there were any."""
        counters = dict(self.queue.stats())
        busy_ns = counters["busy_ns"]
        counters["depth_achieved"] = counters["latency_ns"] / busy_ns if busy_ns else 0.0
        return counters
