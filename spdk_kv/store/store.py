"""The store: tensors under keys, and sequences of KV cache, on one drive."""

from __future__ import annotations

import logging
import mmap as memory_map
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import PageCacheEngine
from spdk_kv.errors import SpdkKvError
from spdk_kv.link import Links
from spdk_kv.metrics import Sample
from spdk_kv.placement import StagingPool
from spdk_kv.store import background
from spdk_kv.store.before_flush import BeforeFlush
from spdk_kv.store.blobs import BlobReader, BlobWriter
from spdk_kv.store.catalog import Catalog
from spdk_kv.store.closing import Closing
from spdk_kv.store.committer import SEQUENCE_AGES
from spdk_kv.store.extents import ExtentTable
from spdk_kv.store.lifetime import Lifetime
from spdk_kv.store.mapped import detach, map_blob
from spdk_kv.store.parts import open_parts
from spdk_kv.store.paths import check_settings, open_paths
from spdk_kv.store.places import Places
from spdk_kv.store.recorded import count_holders
from spdk_kv.store.records import Records
from spdk_kv.store.sampling import publisher_of, sample_of
from spdk_kv.store.sequence_calls import SequenceCalls
from spdk_kv.store.sequences import LeftOut, OpenSequences, report
from spdk_kv.store.settings import StoreSettings
from spdk_kv.store.space import SpaceCalls
from spdk_kv.store.stats import stats_of
from spdk_kv.store.writes import Writes

log = logging.getLogger(__name__)

T = TypeVar("T")


class KVStore(Lifetime, SequenceCalls, SpaceCalls):
    """An open store; make one with :func:`spdk_kv.open`. Thread-safe; a context manager.

    What :meth:`put` wrote is visible to :meth:`get` in this process at once. It survives a crash
    from the next :meth:`flush`, background flush or :meth:`close` on.
    """

    def __init__(self, location: str | os.PathLike[str], settings: StoreSettings) -> None:
        self._closed = True
        self._pid = os.getpid()
        check_settings(location, settings)
        self._parts = open_parts(location, settings)
        try:
            self.engine = self._parts.engine
            self._mmap = settings.page_cache.mmap
            if self._mmap and not isinstance(self.engine, PageCacheEngine):
                raise ValueError(f"mmap=True is for the pagecache engine, not {self.engine.name}")
            self.verify = settings.verify and self.engine.keeps_bytes
            # Without an index nothing is ever committed.
            lasting = self._parts.index is not None or bool(settings.engine.discard)
            extents = ExtentTable(
                self._parts.allocator, lasting, count_holders(self._parts.sequences.values())
            )
            self._records = Records(self._parts.blobs, self._parts.sequences, extents)
            self._records.counters["corruptions"] += self._parts.damaged
            index = self._parts.index
            ages = None if index is None else index.get_meta(SEQUENCE_AGES)
            self._records.uses.load(ages, self._records.residents.now)
            self.catalog = Catalog(
                self._records,
                self.engine,
                self._parts.index,
                settings.eviction,
                settings.engine.discard,
                Places(self._parts.paths),
            )
            self.staging = StagingPool(self.engine.allocate, settings.engine.staging_nbytes)
            self.paths = open_paths(self._parts, self.staging, settings)
            self.links = Links(self.paths.routes.engines)
            self._sequences = OpenSequences(self._records, index)
            self.catalog.room.make_idle = self._sequences.make_idle
            self.before_flush = BeforeFlush()
            self._background = background.Background()
            self.failed_flushes = 0
            self.writes = Writes(settings.allowed_writes, self.engine, index)
            self.mappings: weakref.WeakSet[memory_map.mmap] = weakref.WeakSet()
            self._stop = threading.Event()
            self.opened_s = time.time()
            publisher = publisher_of(self, self._parts.lock)
            left_out: LeftOut = []
            self._closing = Closing(
                self._sequences.delete_temporary,
                partial(self._sequences.stage, left_out),
                self.catalog.close,
                self.catalog.trimmer.close,
                self.catalog.committer.save_order,
                self.writes.keep,
                self.catalog.committer.end,
                partial(report, left_out, "the caller"),
                partial(detach, self.mappings),
                publisher.close,
                self.paths.close,
                self._parts.close,
            )
        except BaseException:
            self._parts.close()
            raise
        self._closed = False
        background.opened(self)
        if settings.flush_interval_s is not None and self.engine.persistent:
            background.flush_every(self, self._stop, settings.flush_interval_s)
        publisher.start()

    @property
    def location(self) -> str:
        """The URI of this store."""
        return str(self._parts.location)

    @property
    def uuid(self) -> str:
        """The store's identity, drawn when it was begun: 32 hexadecimal digits."""
        return self._parts.uuid

    # -- blobs ----------------------------------------------------------------------------------

    def put(self, key: str, tensor: Any, *, timeout_s: float | None = None) -> None:
        """Stores ``tensor`` under ``key``, and replaces what was there.

        Blocks until the drive has the bytes; see :meth:`flush` for durability.

        Args:
            key: Any text.
            tensor: torch or numpy, any dtype, shape and strides, on the CPU or a GPU.
            timeout_s: Seconds until the write is given up, also while room is made for it; None
                waits as long as it takes.

        Raises:
            ShapeMismatch: The dtype cannot be stored.
            CapacityError: There is no room, and none can be made.
            WriteBudgetSpent: The store was opened with a ``write_budget``, and nothing is left.
            DeviceError, DeviceTimeout: The drive failed, or was too slow.
            ReadOnlyStore: The store is open ``read_only``.
            ClosedError: The store is closed.

        After any of these the key holds what it held before.
        """
        self.put_many({key: tensor}, timeout_s=timeout_s)

    def put_many(self, tensors: Mapping[str, Any], *, timeout_s: float | None = None) -> None:
        """As :meth:`put`, for several tensors in one transfer: all become visible, or none."""
        self.check_writable("put")
        self.writes.check()
        BlobWriter(self, tensors, NEVER if timeout_s is None else Deadline(timeout_s)).run()

    def put_async(self, key: str, tensor: Any, *, timeout_s: float | None = None) -> Future[None]:
        """As :meth:`put`, but returns a future. The tensor must stay unchanged until it is done.

        Blocks only to make room, and to copy a tensor that is not contiguous on the CPU. Errors
        before the transfer are raised here.
        """
        return self.put_many_async({key: tensor}, timeout_s=timeout_s)

    def put_many_async(
        self, tensors: Mapping[str, Any], *, timeout_s: float | None = None
    ) -> Future[None]:
        """As :meth:`put_many`, but returns a future."""
        self.check_writable("put")
        self.writes.check()
        return self._background.track(
            BlobWriter(self, tensors, NEVER if timeout_s is None else Deadline(timeout_s)).start()
        )

    def get(
        self,
        key: str,
        *,
        out: Any = None,
        device: Any = None,
        as_numpy: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """The tensor under ``key``: exactly the bytes, dtype and shape that were put. Blocks.

        Args:
            key: The key that it was put under.
            out: A torch tensor or numpy array of that dtype and shape to read into; excludes
                ``device`` and ``as_numpy``. Its contents are undefined after an error.
            device: Of the new torch tensor. None is the CPU, in page-aligned memory that the drive
                wrote to itself. A GPU gets the tensor while the drive still reads, and torch's
                current stream waits for the rest.
            as_numpy: Return a numpy array instead.
            timeout_s: Seconds until the read is given up; None waits as long as it takes.

        Returns:
            ``out``, or a new tensor or array.

        Raises:
            KeyNotFound: There is no such blob.
            ShapeMismatch: ``out`` does not fit; raised before any I/O.
            CorruptionError: The bytes are not those that were put. The blob is then forgotten, but
                not by a store that is open ``read_only``.
            DeviceError, DeviceTimeout: The drive failed, or was too slow.
            ClosedError: The store is closed.
        """
        self.check_open()
        if self._mmap and out is None and not as_numpy and device is None:
            return map_blob(self, key)
        outs = None if out is None else (out,)
        return self._read((key,), outs, device, as_numpy, timeout_s)[0]

    def get_many(
        self,
        keys: Iterable[str],
        *,
        out: Iterable[Any] | None = None,
        device: Any = None,
        as_numpy: bool = False,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """As :meth:`get`, for several tensors in one transfer, in the order of ``keys``."""
        self.check_open()
        outs = None if out is None else tuple(out)
        return self._read(tuple(keys), outs, device, as_numpy, timeout_s)

    def _read(
        self,
        keys: tuple[str, ...],
        outs: tuple[Any, ...] | None,
        device: Any,
        as_numpy: bool,
        timeout_s: float | None,
    ) -> list[Any]:
        return BlobReader(self, keys, outs, device, as_numpy).run(timeout_s)

    def get_async(
        self,
        key: str,
        *,
        out: Any = None,
        device: Any = None,
        as_numpy: bool = False,
        timeout_s: float | None = None,
    ) -> Future[Any]:
        """As :meth:`get`, but returns a future. ShapeMismatch and KeyNotFound are raised here."""
        self.check_open()
        outs = None if out is None else (out,)
        return self._start((key,), outs, device, as_numpy, timeout_s, lambda found: found[0])

    def get_many_async(
        self,
        keys: Iterable[str],
        *,
        out: Iterable[Any] | None = None,
        device: Any = None,
        as_numpy: bool = False,
        timeout_s: float | None = None,
    ) -> Future[list[Any]]:
        """As :meth:`get_many`, but returns a future."""
        self.check_open()
        outs = None if out is None else tuple(out)
        return self._start(tuple(keys), outs, device, as_numpy, timeout_s, lambda found: found)

    def _start(
        self,
        keys: tuple[str, ...],
        outs: tuple[Any, ...] | None,
        device: Any,
        as_numpy: bool,
        timeout_s: float | None,
        pick: Callable[[list[Any]], T],
    ) -> Future[T]:
        return BlobReader(self, keys, outs, device, as_numpy).start(timeout_s, pick)

    def delete(self, key: str) -> bool:
        """Forgets ``key``. Returns whether it was there. Does not block on the drive.
        ReadOnlyStore where the store is open ``read_only``."""
        self.check_writable("delete")
        return self._records.drop(key)

    def contains(self, key: str) -> bool:
        """Whether a blob is stored under ``key``. Does not block."""
        self.check_open()
        return key in self._records.blobs

    __contains__ = contains

    def sizes(self, keys: Iterable[str]) -> list[int | None]:
        """The bytes of the blob under each of ``keys``, None where there is none.

        Counts as no use of them. Does not block; a store that is open ``read_only`` looks for news
        where one is not known.
        """
        self.check_open()
        return self._records.sizes(list(keys))

    def touch(self, keys: Iterable[str]) -> None:
        """Counts as a use of the blobs under ``keys``, as far as there are any: what is used is
        evicted later. For who has the bytes from elsewhere, and would have got them here. Does not
        block; nothing happens to a store that is open ``read_only``, which has no order of its own.
        """
        self.check_open()
        self._records.touch(keys)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys of all blobs that begin with ``prefix``, least recently used first.

        Does not block.
        """
        self.check_open()
        with self._records.lock:
            return self._records.blobs.keys(prefix)

    def __len__(self) -> int:
        return len(self._records.blobs)

    def worth_writing(self, sizes: Mapping[str, int]) -> list[bool]:
        """For each key whether the ``write_budget`` has so many bytes to spare for it.

        Everything is, while there is plenty left (and where there is no budget). When it runs low,
        what was asked for before is; with nothing left, nothing is. For caches: a caller who has to
        store something puts it. Does not block. ReadOnlyStore where the store is open
        ``read_only``.
        """
        self.check_writable("put")
        return self.writes.admits(sizes)

    # -- the whole ------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a flush would change anything. False after close."""
        return not self._closed and (self._records.dirty or self._sequences.dirty)

    def flush(self, timeout_s: float | None = None) -> None:
        """Blocks until everything put and appended before survives a power cut.

        A sequence that cannot be recorded does not keep the rest back: everything else is safe when
        the error comes, which names the sequence. One that is lost (its own calls raise) is named
        by one flush, and passed by from then on; one whose write failed, by each that tries again.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Raises:
            DeviceError: The drive failed, or failed a sequence. Where the kernel may have dropped
                what it could not write (an fsync failed), no flush succeeds until the store is
                opened again.
            DeviceTimeout: It takes longer; it goes on, and the next flush waits for it.
            DeviceGone: A file of the store was removed or replaced while it was open.
            CapacityError: The index has no room on its disk, even after eviction (if that is
                allowed), or cannot hold a record, which the message names; the rest is flushed.
            ReadOnlyStore: The store is open ``read_only``.
            ClosedError: The store is closed.
        """
        self._flush(timeout_s, "the caller")

    def flush_in_background(self) -> None:
        """As :meth:`flush`, for the thread that flushes regularly: it logs what is raised, and
        who calls :meth:`flush` is still told of it."""
        self._flush(None, "the log")

    def _flush(self, timeout_s: float | None, audience: str) -> None:
        self.check_writable("flush")
        deadline = Deadline(timeout_s)
        left_out: LeftOut = []
        self.before_flush.run(deadline)
        self._sequences.stage(left_out, deadline)
        self.catalog.commit(deadline.left_s())
        self.writes.keep()
        report(left_out, audience)
        if audience == "the caller":
            self.catalog.trim_for_flush(deadline.left_s())

    def flush_async(self, timeout_s: float | None = None) -> Future[None]:
        """As :meth:`flush`, but returns a future."""
        self.check_writable("flush")
        return self.run_in_background(lambda: self.flush(timeout_s))

    def count_failed_flush(self) -> None:
        """Called by the thread that flushes in the background."""
        self.failed_flushes += 1

    def run_in_background(self, work: Callable[[], T]) -> Future[T]:
        """Runs ``work`` on one of the store's threads. ClosedError after close."""
        self.check_open()
        return self._background.run(work)

    def stats(self) -> dict[str, Any]:
        """What the store holds and did: counts, bytes, hits and misses, and the engine's counters
        (times in nanoseconds). Does not block."""
        self.check_open()
        return stats_of(self)

    def sample(self) -> Sample:
        """All that ``spdk_kv.metrics`` tells of the store, at this moment. Does not block."""
        return sample_of(self)

    def why(self) -> list[dict[str, Any]]:
        """The path of each unit of each sequence in use, and why. Does not block."""
        self.check_open()
        return self.paths.why()

    def close(self) -> None:
        """Flushes, and gives the drive back. May be called twice: a second call finishes what an
        interrupt (Ctrl-C) left.

        Waits for asynchronous work; calls of other threads meanwhile end with ClosedError. Tensors
        that were got stay valid. Raises what the flush raised, after everything was released.
        """
        if os.getpid() != self._pid:
            self._closed = True
            return
        if self._closing.is_over():
            return
        if not (self._closed or self.read_only):
            self.before_flush.run()
        self._stop.set()
        try:
            self._background.close()
        finally:
            self._closed = True
        try:
            self._closing.run()
        finally:
            if self._closing.is_over():
                background.closed(self)

    def __del__(self) -> None:
        is_open = hasattr(self, "_closing") and not self._closing.is_over()
        if is_open and os.getpid() == self._pid:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            try:
                self.close()
            except SpdkKvError:
                log.exception("closing a forgotten store")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.engine.name}, {len(self)} blobs"
        return f"<KVStore {self.location} ({state})>"
