"""One put or get of blobs: from keys and tensors to one transfer, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.errors import ClosedError, CorruptionError, ShapeMismatch, is_unreadable
from spdk_kv.index_records import BlobRecord
from spdk_kv.store_catalog import shown
from spdk_kv.tensors import Destination, array_from, byte_view, destination, tensor_from

if TYPE_CHECKING:
    from spdk_kv.store import KVStore

T = TypeVar("T")


class BlobWriter:
    """Writes tensors into new extents, then publishes their records. Used once."""

    def __init__(self, store: KVStore, tensors: Mapping[str, Any]) -> None:
        for key in tensors:
            check_key(key)
        self._store = store
        self._catalog = store.catalog
        self._keys = list(tensors)
        self._views = [byte_view(tensor) for tensor in tensors.values()]
        # Always: a store opened with verify=False now may be opened with it next time.
        self._checksum = store.engine.keeps_bytes
        self._transfer = store.engine.transfer(WRITE, checksum=self._checksum)
        filled = [view for view in self._views if view.nbytes]
        self._offsets = self._catalog.allocate([v.nbytes for v in filled]) if filled else []
        # None once they are published or given up: that happens once, whatever interrupts it.
        self._owned: list[int] | None = self._offsets
        try:
            for view, offset in zip(filled, self._offsets, strict=True):
                self._transfer.keep(view.keep)
                self._transfer.add(offset, view.address, view.nbytes)
        except BaseException:
            self._give_up()
            raise

    def run(self, timeout_s: float | None) -> None:
        """Blocks until written and visible."""
        try:
            self._store.engine.run(self._transfer, timeout_s)
            self._publish()
        except BaseException:
            self._give_up()
            raise

    def start(self, timeout_s: float | None) -> Future[None]:
        """Returns at once; the future is done when the blobs are visible."""
        try:
            return self._store.engine.start(self._transfer, self._finish, timeout_s=timeout_s)
        except BaseException:
            self._give_up()
            raise

    def _finish(self, transfer: Transfer) -> None:
        if transfer.status:
            self._give_up()
            raise self._store.engine.error(transfer)
        self._publish()

    def _take(self) -> list[int] | None:
        with self._catalog.lock:
            owned, self._owned = self._owned, None
            return owned

    def _give_up(self) -> None:
        offsets = self._take()
        if offsets:
            # After a deadline the device may still write there.
            self._catalog.release([self._transfer], lambda: self._catalog.abandon(offsets))

    def _publish(self) -> None:
        records = {}
        piece = 0
        for key, view in zip(self._keys, self._views, strict=True):
            offset = crc = 0
            if view.nbytes:
                offset = self._offsets[piece]
                crc = self._transfer.crc(piece) if self._checksum else 0
                piece += 1
            records[key] = BlobRecord(offset, view.nbytes, view.dtype, view.shape, crc)
        offsets = self._take()
        if offsets is None:
            return  # given up: whoever started it was interrupted
        try:
            self._catalog.publish(records)
        except ClosedError:
            self._catalog.abandon(offsets)
            raise


class BlobReader:
    """Reads blobs by one transfer. Used once."""

    def __init__(
        self,
        store: KVStore,
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
            raise ShapeMismatch(
                "out says where the bytes go; device and as_numpy do not go with it"
            )
        self._store = store
        self._keys = keys
        self._device = device
        self._as_numpy = as_numpy
        self._records = store.catalog.find(keys)
        self._pinned = self._records
        try:
            self._destinations: list[Destination | None] = [None] * len(keys)
            if outs is not None:
                self._destinations = [
                    destination(out, record.dtype, record.shape)
                    for out, record in zip(outs, self._records, strict=True)
                ]
            self._leases: list[Any] = [None] * len(keys)
            self._transfer = store.engine.transfer(READ, checksum=store.verify)
            for position in range(len(keys)):
                self._add(position)
        except BaseException:
            self._unpin()
            raise

    def _add(self, position: int) -> None:
        record, place = self._records[position], self._destinations[position]
        if not record.nbytes:
            return
        if place is not None and place.view is not None:
            self._transfer.keep(place.view.keep)
            self._transfer.add(record.offset, place.view.address, record.nbytes)
            return
        if self._device is not None:
            self._store.staging.pin_for_gpu()
        lease = self._store.staging.lease(record.nbytes)
        self._leases[position] = lease
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
            if transfer.status:
                failure = self._store.engine.error(transfer)
                self._failed(failure)
                raise failure
            return pick(self._results())

        try:
            return self._store.engine.start(self._transfer, finish, timeout_s=timeout_s)
        except BaseException as failure:
            self._failed(failure)
            raise

    def _failed(self, failure: BaseException) -> None:
        """Unpins, once the device has let go; forgets a blob whose bytes cannot be read."""
        self._store.catalog.release([self._transfer], self._unpin)
        if is_unreadable(failure):
            for key, record in self._failed_blobs():
                self._store.catalog.drop_damaged(key, record)

    def _unpin(self) -> None:
        """Once, even where an interrupted start and the transfer's end both come here: another
        reader may have the same extents pinned."""
        with self._store.catalog.lock:
            pinned, self._pinned = self._pinned, []
            self._store.catalog.unpin(pinned)

    def _failed_blobs(self) -> list[tuple[str, BlobRecord]]:
        """Those that the failed command belongs to."""
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
        for key, record in zip(self._keys, self._records, strict=True):
            if not record.nbytes:
                continue
            if self._transfer.crc(piece) != record.crc:
                damaged.append(key)
                self._store.catalog.drop_damaged(key, record)
            piece += 1
        if damaged:
            raise damage(self._store.location, damaged)

    def _result(self, position: int) -> Any:
        record, place = self._records[position], self._destinations[position]
        if place is not None and place.direct:
            return place.out
        lease = self._leases[position]
        if self._as_numpy:
            return array_from(lease, record.dtype, record.shape)
        tensor = tensor_from(lease, record.dtype, record.shape)
        if place is not None:
            return place.fill(tensor)
        return tensor if self._device is None else tensor.to(self._device)


def damage(location: str, keys: list[str]) -> CorruptionError:
    """The error for blobs whose checksum does not match."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return CorruptionError(
        f"the stored bytes of {shown(keys[0])}{more} in {location} are not those that were put "
        "(CRC32C differs); forgotten, so that they can be put again"
    )


def check_key(key: object) -> None:
    """TypeError unless ``key`` is one."""
    if not isinstance(key, str):
        raise TypeError(f"a key is a str, not {type(key).__name__}")
