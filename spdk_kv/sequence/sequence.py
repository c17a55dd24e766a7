"""A sequence: the KV cache of one request or batch, layer by layer, on the device."""

from __future__ import annotations

import math
import operator
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    CorruptionError,
    ShapeMismatch,
    SpdkKvError,
    is_unreadable,
)
from spdk_kv.index import SequenceRecord
from spdk_kv.placement import CHUNK_NBYTES, SequenceLayout
from spdk_kv.sequence.ahead import ReadAhead
from spdk_kv.sequence.arguments import batch_order, check_tokens, head_list, token_range
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.layer import LayerCache
from spdk_kv.sequence.record import make_record
from spdk_kv.sequence.views import read_all, read_heads
from spdk_kv.types import Granularity, KVShape

if TYPE_CHECKING:
    import torch

# Appended bytes on their way to the device, over all layers; beyond it an append waits.
_MOST_PENDING_NBYTES = 128 << 20


class Sequence:
    """KV cache of one request or batch; make one with :meth:`KVStore.sequence`.

    Thread-safe; work on different layers runs in parallel. A write that failed makes its layer
    raise that error from then on: delete the sequence and compute it again.
    """

    def __init__(
        self, store: Host, name: str, layout: SequenceLayout, offsets: list[int], temporary: bool
    ) -> None:
        self.name = name
        self.temporary = temporary
        self.dirty = False
        self._store = store
        self._layout = layout
        self._offsets = offsets
        self.deleted = False
        self._group = store.paths.adopt(f"sequence {name!r}", layout.unit_extents(offsets))
        step = layout.extents_per_layer
        try:
            self._layers = [
                LayerCache(
                    f"sequence {name!r}, layer {number}",
                    store.paths,
                    store.staging,
                    layout,
                    offsets[number * step : (number + 1) * step],
                    self._group.units[2 * number : 2 * number + 2],
                    store.verify,
                )
                for number in range(layout.shape.layers)
            ]
        except BaseException:
            store.paths.release(self._group)
            raise
        # Tokens of each layer that the last record covers. Where some of them were forgotten since,
        # the device must not be written to before a newer record is committed: after a crash the
        # last one still has to find its bytes.
        self._recorded = [0] * layout.shape.layers
        self._record_first = False
        # Held while records are made and while they are overtaken: by truncate and delete.
        self._record_lock = threading.RLock()
        self._writing: deque[LayerCache] = deque()
        self._ahead = ReadAhead(store.paths, self._group, self._layers, layout.shape.max_tokens)

    @classmethod
    def created(
        cls,
        store: Host,
        name: str,
        shape: KVShape,
        granularity: Granularity,
        temporary: bool,
    ) -> Sequence:
        """A new, empty sequence with extents for all its tokens. CapacityError."""
        chunk = CHUNK_NBYTES
        while store.engine.segment_nbytes % chunk:
            chunk //= 2
        layout = SequenceLayout(shape, granularity, chunk)
        offsets = store.catalog.allocate([layout.extent_nbytes] * layout.extents)
        try:
            sequence = cls(store, name, layout, offsets, temporary)
        except BaseException:
            store.catalog.abandon(offsets)
            raise
        sequence.dirty = not temporary
        return sequence

    @classmethod
    def restored(cls, store: Host, name: str, record: SequenceRecord) -> Sequence:
        """A recorded sequence, as it was at its last flush. Blocks on the device.

        CorruptionError, and the sequence forgotten, where its last chunk is damaged.
        """
        granularity: Granularity = "head" if record.granularity == "head" else "layer"
        layout = SequenceLayout(record.shape, granularity, record.chunk_nbytes)
        if store.engine.segment_nbytes % layout.chunk_nbytes:
            raise ShapeMismatch(
                f"sequence {name!r} has checksums per {layout.chunk_nbytes} bytes; open the store "
                f"with segments that are a multiple of it, not {store.engine.segment_nbytes}"
            )
        if len(record.units) != layout.extents:
            raise CorruptionError(f"the index gives sequence {name!r} a wrong number of extents")
        try:
            return cls._restored(store, name, record, layout)
        except SpdkKvError as failure:
            if is_unreadable(failure):
                store.catalog.count_corruption()
                store.catalog.drop_sequence(name, [unit.offset for unit in record.units])
            raise

    @classmethod
    def _restored(
        cls, store: Host, name: str, record: SequenceRecord, layout: SequenceLayout
    ) -> Sequence:
        sequence = cls(store, name, layout, [unit.offset for unit in record.units], False)
        try:
            sequence._restore(record)
        except BaseException:
            store.paths.release(sequence._group)
            raise
        return sequence

    def _restore(self, record: SequenceRecord) -> None:
        layout = self._layout
        step, at = layout.extents_per_layer, 0
        for number, layer in enumerate(self._layers):
            units = record.units[number * step : (number + 1) * step]
            nbytes = units[0].nbytes // layout.row_nbytes * record.shape.batch * 4
            layer.restore(units, record.row_map[at : at + nbytes] if record.row_map else b"")
            at += nbytes
            self._recorded[number] = layer.tokens

    # -- what it is -----------------------------------------------------------------------------

    @property
    def read_ahead(self) -> bool:
        """Whether layers are read ahead unasked, in the order of the last turns; may be set. Off
        once :meth:`prefetch` was called."""
        return self._ahead.learns

    @read_ahead.setter
    def read_ahead(self, learns: bool) -> None:
        self._ahead.learns = learns

    def set_weight(self, layers: Iterable[int], weight: float) -> None:
        """How much it matters that ``layers`` stay in the page cache; 1.0 unless told, and heavier
        ones are kept first. Takes effect at the next decision. ValueError unless finite."""
        if not math.isfinite(weight):
            raise ValueError(f"a weight is a finite number, not {weight}")
        for layer in layers:
            number = self._number(layer)
            for unit in self._group.units[2 * number : 2 * number + 2]:
                unit.weight = float(weight)

    @property
    def shape(self) -> KVShape:
        """As given at creation."""
        return self._layout.shape

    @property
    def granularity(self) -> Granularity:
        """``layer`` or ``head``: what one extent holds."""
        return self._layout.granularity

    def tokens(self, layer: int = 0) -> int:
        """Tokens appended to ``layer`` so far."""
        return self._layer(layer).tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in all layers."""
        return sum(2 * layer.tokens for layer in self._layers) * self.shape.token_nbytes

    # -- tokens ---------------------------------------------------------------------------------

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Adds tokens to a layer: ``k`` and ``v`` are ``[batch, kv_heads, tokens, head_dim]``.

        Copies them and returns; the device writes in the background. Blocks for the copy from a
        GPU (of what fills no chunk, where a link reaches it), and while more than 64 MiB of the
        layer, or 128 MiB in all, wait to be written. Raises ShapeMismatch and CapacityError (more
        than ``max_tokens``) before anything is changed, and the error of a write, after which the
        layer is lost.
        """
        cache = self._layer(layer)
        check_tokens(self.shape, k, v)
        while not (appended := self._append(cache, k.detach(), v.detach())):
            self._record_now()
        self.dirty = not self.temporary
        if appended > 1:
            self._writing.append(cache)
            self._limit_pending()

    def _append(self, cache: LayerCache, k: torch.Tensor, v: torch.Tensor) -> int:
        """0: the record has to be made first; 1: appended; 2: and something is being written."""
        with cache.lock:
            if self._record_first:
                return 0
            if cache.tokens + k.shape[2] > self.shape.max_tokens:
                raise CapacityError(
                    f"{cache.name}: {cache.tokens} tokens and {k.shape[2]} more exceed max_tokens "
                    f"{self.shape.max_tokens}"
                )
            cache.settle(wait=False)
            if not k.shape[2]:
                return 1
            cache.append(k, v, self._store.links.of((k, v)))
            return 2 if cache.pending_nbytes else 1

    def append_async(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Future[None]:
        """As :meth:`append`, but returns a future; appends to one layer must not overtake."""
        linked = self._store.links.of((k, v))
        here = nullcontext() if linked is None else linked.on_this_stream()

        def append() -> None:
            with here:
                self.append(layer, k, v)

        return self._store.run_in_background(append)

    def _limit_pending(self) -> None:
        pending = sum(cache.pending_nbytes for cache in self._layers)
        # Another thread may empty it at the same time, and a layer that failed says so itself.
        with suppress(IndexError):
            while pending > _MOST_PENDING_NBYTES:
                cache = self._writing.popleft()
                with cache.lock, suppress(SpdkKvError):
                    pending -= cache.pending_nbytes
                    cache.settle()
            while len(self._writing) > len(self._layers):
                self._writing.popleft()

    def read(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, ``[batch, kv_heads, tokens, head_dim]`` each.

        ``tokens``: a slice with step 1; ``heads``: which KV heads, in that order. With granularity
        ``layer`` all heads are read and some dropped; with ``head`` only runs of them are. The
        tensors are views of what lies on the device, so their strides are not those of a fresh
        tensor; the memory is theirs. ``device``: where to; a GPU that the store reaches over a
        link is copied to while the drive still reads, and only torch's current stream waits for
        the last copies. Blocks, briefly if the layer was prefetched. Raises ShapeMismatch,
        CorruptionError, DeviceError, and the error of a failed append.
        """
        cache = self._layer(layer)
        wanted = head_list(self.shape.kv_heads, heads)
        linked = None if device is None else self._store.links.gpu(device)
        if device is not None and linked is None:
            self._store.staging.pin_for_gpu()
        self._ahead.device = linked
        self._store.paths.reads(self._group, self._number(layer))
        with cache.lock, self._counting_corruption():
            first, last = token_range(cache.tokens, tokens)
            if wanted is None:
                k, v = read_all(cache, self._layout, first, last, linked)
            else:
                k, v = read_heads(cache, self._layout, first, last, wanted, linked)
        self._ahead.was_read(self._number(layer) if tokens is None and wanted is None else None)
        # Elsewhere, if they were read ahead for another device.
        place = "cpu" if device is None else device
        return k.to(place), v.to(place)

    def read_async(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
    ) -> Future[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`read`, but returns a future."""
        linked = None if device is None else self._store.links.gpu(device)
        here = nullcontext() if linked is None else linked.on_this_stream()

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            with here:
                return self.read(layer, tokens=tokens, heads=heads, device=device)

        return self._store.run_in_background(read)

    def prefetch(
        self, layers: Iterable[int], *, first_token: int = 0, spare_tokens: int = 1
    ) -> None:
        """Starts to read all tokens of ``layers``, in that order, from ``first_token`` on, after
        what is read on demand. Returns at once.

        So many are begun as half of the store's ``staging`` memory has room for, at least one; the
        others when reads have taken those over. Where the last :meth:`read` went to a linked GPU
        they go there, and take as much of its memory. From now on nothing is read ahead unasked.
        The next :meth:`read` of such a layer that begins at ``first_token`` takes them over,
        together with up to ``spare_tokens`` appended in between. The memory is held until then,
        or until a prefetch from another token (one from the end asks for nothing).
        """
        if first_token < 0 or spare_tokens < 0:
            raise ShapeMismatch(f"tokens are counted from 0, not {min(first_token, spare_tokens)}")
        numbers = [self._usable_number(layer) for layer in layers]
        self._ahead.ask(numbers, first_token, spare_tokens)

    def settle(self, layer: int) -> None:
        """Blocks until all tokens appended to ``layer`` are written, and their copies in memory
        given back. Raises the error of a write that failed."""
        cache = self._layer(layer)
        with cache.lock:
            cache.settle()

    @contextmanager
    def _counting_corruption(self) -> Iterator[None]:
        try:
            yield
        except SpdkKvError as failure:
            if is_unreadable(failure):
                self._store.catalog.count_corruption()
            raise

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, tokens: int, *, layer: int | None = None) -> None:
        """Forgets all tokens from ``tokens`` on, in ``layer`` or in all. May block on the device.

        Raises ShapeMismatch where there are fewer; DeviceError or CorruptionError where what stays
        of a chunk cannot be read: that layer and those after it are then as they were.
        """
        numbers = range(len(self._layers)) if layer is None else [self._number(layer)]
        with self._record_lock:
            for number in numbers:
                cache = self._layer(number)
                if not 0 <= tokens <= cache.tokens:
                    raise ShapeMismatch(f"{cache.name} has {cache.tokens} tokens, not {tokens}")
            self.dirty = not self.temporary
            for number in numbers:
                cache = self._layer(number)
                with cache.lock, self._counting_corruption():
                    if tokens < cache.tokens:
                        before = self._record_first
                        self._record_first |= tokens < self._recorded[number]
                        try:
                            cache.truncate(tokens)
                        except SpdkKvError:
                            self._record_first = before  # for it changed nothing
                            raise
            self._record_now()

    def _record_now(self) -> None:
        """Commits a record of what is left, if the last one covers tokens forgotten since."""
        with self._record_lock:
            if self._record_first:
                self.stage_for_commit()
                self._store.catalog.commit()
                self._record_first = False

    def reorder(self, rows: Iterable[int], *, layer: int | None = None) -> None:
        """Row ``b`` of the batch becomes what row ``rows[b]`` was (beam search). No I/O.

        Raises ShapeMismatch unless there is one row of the batch for each.
        """
        index = batch_order(self.shape.batch, rows)
        for number in range(len(self._layers)) if layer is None else [self._number(layer)]:
            cache = self._layer(number)
            with cache.lock:
                cache.reorder(index)
            self.dirty = not self.temporary

    def delete(self) -> None:
        """Gives the extents back; the sequence is of no use afterwards. May be called twice.

        Does not block on the device, but for reads that are under way in other threads.
        """
        with self._record_lock:
            if self.deleted:
                return
            self.deleted = True
            self._ahead.clear()
            writes = []
            for cache in self._layers:
                with cache.lock:
                    writes += cache.close()
            self._store.paths.release(self._group)
            self._store.catalog.drop_sequence(self.name, self._offsets, writes)
            self._store.forget_sequence(self)

    # -- lasting --------------------------------------------------------------------------------

    def stage_for_commit(self) -> None:
        """Writes what is only in memory and gives the catalog the record for its next commit.

        Part of :meth:`KVStore.flush`. Blocks on the device.
        """
        with self._record_lock:
            if self.temporary or self.deleted or not self.dirty:
                return
            self.dirty = False
            try:
                self._stage()
            except BaseException:
                self.dirty = True
                raise

    def _stage(self) -> None:
        record, recorded = make_record(self._layout, self._layers)
        # First what guards the record, should an interrupt come between the two.
        self._recorded = recorded
        self._store.catalog.publish_sequence(self.name, record)

    # -- arguments ------------------------------------------------------------------------------

    def _number(self, layer: int) -> int:
        number = operator.index(layer)
        if not 0 <= number < len(self._layers):
            raise ShapeMismatch(f"sequence {self.name!r} has layers 0 to {len(self._layers) - 1}")
        return number

    def _usable_number(self, layer: int) -> int:
        self._store.check_open()
        if self.deleted:
            raise ClosedError(f"sequence {self.name!r} was deleted")
        return self._number(layer)

    def _layer(self, layer: int) -> LayerCache:
        return self._layers[self._usable_number(layer)]
