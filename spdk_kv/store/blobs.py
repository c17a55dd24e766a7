"""One put or get of blobs: from keys and tensors to one transfer, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import Engine
from spdk_kv.errors import (
    ClosedError,
    CorruptionError,
    ShapeMismatch,
    SpdkKvError,
    is_unreadable,
)
from spdk_kv.index import BlobRecord
from spdk_kv.link import LinkedGpu
from spdk_kv.scattered import Scattered
from spdk_kv.store.host import Host
from spdk_kv.store.records import shown
from spdk_kv.tensors import (
    ByteView,
    Destination,
    array_from,
    byte_view,
    destination,
    tensor_from,
)

T = TypeVar("T")


class BlobWriter:
    """Writes tensors into new extents, then publishes their records. Used once. ``deadline`` is for
    both, and for the room that is made before."""

    def __init__(self, store: Host, tensors: Mapping[str, Any], deadline: Deadline = NEVER) -> None:
        for key in tensors:
            check_key(key)
        self._store = store
        self._catalog = store.catalog
        self._keys = list(tensors)
        linked = store.links.of(tensors.values())
        self._views = [self._view(tensor, on_cpu=linked is None) for tensor in tensors.values()]
        filled = [view for view in self._views if view.nbytes]
        # Also with verify=False: the store may be opened with verify=True next time.
        self._checksum = store.engine.keeps_bytes
        nbytes = sum(view.nbytes for view in filled)
        self._transfer = _transfer(store.engine, WRITE, nbytes, linked, self._checksum)
        self._deadline = deadline
        self._offsets: list[int] = []
        if filled:
            self._offsets = self._catalog.room.allocate([v.nbytes for v in filled], deadline)
        # None once they are published or given up, which happens once, whatever interrupts it.
        self._owned: list[int] | None = self._offsets
        try:
            for view, offset in zip(filled, self._offsets, strict=True):
                _add(self._transfer, offset, view)
        except BaseException:
            self._give_up()
            raise

    def _view(self, tensor: Any, on_cpu: bool) -> ByteView:
        if isinstance(tensor, Scattered) and not tensor.is_whole(self._store.engine.block_nbytes):
            lease = self._store.staging.lease(tensor.nbytes)
            tensor.gather(array_from(lease, "uint8", tensor.shape))
            return ByteView(lease.address, tensor.nbytes, "uint8", tensor.shape, lease)
        return byte_view(tensor, on_cpu=on_cpu)

    def run(self) -> None:
        """Blocks until written and visible."""
        try:
            self._store.engine.run(self._transfer, self._deadline.left_s())
            self._publish()
        except BaseException:
            self._give_up()
            raise

    def start(self) -> Future[None]:
        """Returns at once; the future is done when the blobs are visible."""
        try:
            return self._store.engine.start(
                self._transfer, self._finish, timeout_s=self._deadline.left_s()
            )
        except BaseException:
            self._give_up()
            raise

    def _finish(self, transfer: Transfer) -> None:
        if transfer.status:
            self._give_up()
            raise self._store.engine.error(transfer)
        self._publish()

    def _take(self) -> list[int] | None:
        with self._catalog.records.lock:
            owned, self._owned = self._owned, None
            return owned

    def _give_up(self) -> None:
        offsets = self._take()
        if offsets:
            # After a deadline the drive may still write there.
            self._catalog.quarantine.release(
                [self._transfer], lambda: self._catalog.room.abandon(offsets)
            )

    def _publish(self) -> None:
        records = {}
        offsets, piece = iter(self._offsets), 0
        for key, view in zip(self._keys, self._views, strict=True):
            offset = crc = 0
            if view.nbytes:
                offset, count = next(offsets), _count(view)
                crc = self._transfer.crc(piece, count) if self._checksum else 0
                piece += count
            records[key] = BlobRecord(offset, view.nbytes, view.dtype, view.shape, crc)
        owned = self._take()
        if owned is None:
            return  # given up: whoever started it was interrupted
        try:
            self._catalog.records.publish(records)
        except ClosedError:
            self._catalog.room.abandon(owned)
            raise


class BlobReader:
    """Reads blobs by one transfer. Used once."""

    def __init__(
        self,
        store: Host,
        keys: tuple[str, ...],
        outs: tuple[Any, ...] | None,
        device: Any,
        as_numpy: bool,
    ) -> None:
        for key in keys:
            check_key(key)
        if outs is not None and len(outs) != len(keys):
            raise ShapeMismatch(f"{len(outs)} outs for {len(keys)} keys")
        if outs is not None and (device is not None or as_numpy):
            raise ShapeMismatch("out is where the bytes go, so it excludes device and as_numpy")
        self._store = store
        self._keys = keys
        self._device = device
        self._as_numpy = as_numpy
        self._records = store.catalog.records.find(keys)
        self._pinned = self._records
        try:
            self._destinations: list[Destination | None] = [None] * len(keys)
            if outs is not None:
                self._destinations = [
                    destination(out, record.dtype, record.shape, store.engine.block_nbytes)
                    for out, record in zip(outs, self._records, strict=True)
                ]
            self._linked = self._reached(outs)
            # Per key: a lease, or a tensor on the linked GPU.
            self._places: list[Any] = [None] * len(keys)
            nbytes = sum(record.nbytes for record in self._records)
            self._transfer = _transfer(store.engine, READ, nbytes, self._linked, store.verify)
            for position in range(len(keys)):
                self._add(position)
        except BaseException:
            self._unpin()
            raise

    @property
    def records(self) -> list[BlobRecord]:
        """What is read, in the order of the keys."""
        return self._records

    def _reached(self, outs: tuple[Any, ...] | None) -> LinkedGpu | None:
        """The GPU that everything goes to, if it is reached over a link."""
        if outs is None:
            wanted = self._device is not None and not self._as_numpy
            return self._store.links.gpu(self._device) if wanted else None
        plain = all(place is not None and place.plain for place in self._destinations)
        return self._store.links.of(outs) if plain else None

    def _add(self, position: int) -> None:
        record, place = self._records[position], self._destinations[position]
        if self._linked is not None:
            tensor = place.out if place else self._linked.empty(record.dtype, record.shape)
            self._places[position] = tensor
            if record.nbytes:
                self._transfer.keep(tensor)
                self._transfer.add(record.offset, tensor.data_ptr(), record.nbytes)
            return
        if not record.nbytes:
            return
        if place is not None and place.view is not None:
            _add(self._transfer, record.offset, place.view)
            return
        if self._device is not None:
            self._store.staging.pin_for_gpu()
        lease = self._store.staging.lease(record.nbytes)
        self._places[position] = lease
        self._transfer.keep(lease)
        self._transfer.add(record.offset, lease.address, record.nbytes, lease.capacity)

    def run(self, timeout_s: float | None) -> list[Any]:
        """Blocks until all tensors are there."""
        try:
            self._store.engine.run(self._transfer, timeout_s)
        except BaseException as failure:
            self._failed(failure)
            raise
        return self._results()

    def start(self, timeout_s: float | None, pick: Callable[[list[Any]], T]) -> Future[T]:
        """Returns at once; the future's result is ``pick`` of the tensors."""

        def finish(transfer: Transfer) -> T:
            try:
                # It is over; on a GPU the stream waits for the last copies from here on.
                self._store.engine.wait(transfer)
            except SpdkKvError as failure:
                self._failed(failure)
                raise
            return pick(self._results())

        try:
            return self._store.engine.start(self._transfer, finish, timeout_s=timeout_s)
        except BaseException as failure:
            self._failed(failure)
            raise

    def _failed(self, failure: BaseException) -> None:
        """Unpins once the drive has let go, and forgets a blob whose bytes cannot be read."""
        self._store.catalog.quarantine.release([self._transfer], self._unpin)
        if is_unreadable(failure):
            for key, record in self._failed_blobs():
                self._store.catalog.records.drop_damaged(key, record)

    def _unpin(self) -> None:
        """Unpins once, even where an interrupted start and the transfer's end both come here:
        another reader may have the same extents pinned."""
        with self._store.catalog.records.lock:
            pinned, self._pinned = self._pinned, []
            self._store.catalog.records.unpin(pinned)

    def _failed_blobs(self) -> list[tuple[str, BlobRecord]]:
        """The blobs that the failed command belongs to."""
        offset, _ = self._transfer.failure or (-1, 0)
        return [
            (key, record)
            for key, record in zip(self._keys, self._records, strict=True)
            if record.offset <= offset < record.offset + record.nbytes
        ]

    def _results(self) -> list[Any]:
        try:
            if self._store.verify:
                self._check()
            return [self._result(position) for position in range(len(self._keys))]
        finally:
            self._unpin()

    def _check(self) -> None:
        damaged = []
        piece = 0
        for key, record, place in zip(self._keys, self._records, self._destinations, strict=True):
            if not record.nbytes:
                continue
            count = 1 if place is None or place.view is None else _count(place.view)
            if self._transfer.crc(piece, count) != record.crc:
                damaged.append(key)
                self._store.catalog.records.drop_damaged(key, record)
            piece += count
        if damaged:
            raise damage(self._store, damaged)

    def _result(self, position: int) -> Any:
        record, place = self._records[position], self._destinations[position]
        if self._linked is not None:
            return self._places[position]
        if place is not None and place.direct:
            return place.out
        lease = self._places[position]
        if self._as_numpy:
            return array_from(lease, record.dtype, record.shape)
        if place is not None and isinstance(place.out, Scattered):
            place.out.scatter(array_from(lease, record.dtype, record.shape))
            return place.out
        tensor = tensor_from(lease, record.dtype, record.shape)
        if place is not None:
            return place.fill(tensor)
        return tensor if self._device is None else tensor.to(self._device)


def _transfer(
    engine: Engine, op: int, nbytes: int, linked: LinkedGpu | None, checksum: bool
) -> Transfer:
    """An empty transfer for ``nbytes`` in all, of host memory or of a linked GPU's."""
    if linked is None:
        return engine.transfer(op, checksum=checksum)
    return linked.transfer(engine, op, nbytes, linked.stream(), checksum=checksum)


def _add(transfer: Transfer, offset: int, view: ByteView) -> None:
    """Adds a blob's bytes, which lie at ``offset`` of the drive."""
    transfer.keep(view.keep)
    if not view.pieces:
        transfer.add(offset, view.address, view.nbytes)
    for nbytes, address in view.pieces:
        transfer.add(offset, address, nbytes)
        offset += nbytes


def _count(view: ByteView) -> int:
    """How many pieces of a transfer :func:`_add` makes of a blob that is not empty."""
    return len(view.pieces) or 1


def damage(store: Host, keys: list[str]) -> CorruptionError:
    """The error for blobs whose checksum does not match."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    outcome = "forgotten, so that they can be put again"
    if store.read_only:
        outcome = "a reader forgets nothing: put them again, or delete them, where it is written"
    return CorruptionError(
        f"the stored bytes of {shown(keys[0])}{more} in {store.location} are not those that were "
        f"put (CRC32C differs); {outcome}"
    )


def check_key(key: object) -> None:
    """TypeError unless ``key`` is one."""
    if not isinstance(key, str):
        raise TypeError(f"a key is a str, not {type(key).__name__}")
