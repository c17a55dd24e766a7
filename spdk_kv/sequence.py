"""A sequence: the KV cache of one request or batch, layer by layer, on the device."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sizes
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from spdk_kv.engines import Engine
from spdk_kv.errors import CapacityError, ClosedError, CorruptionError, ShapeMismatch
from spdk_kv.index import SequenceRecord
from spdk_kv.layout import CHUNK_NBYTES, SequenceLayout
from spdk_kv.sequence_layer import LayerCache
from spdk_kv.staging import StagingPool
from spdk_kv.types import Granularity, KVShape, dtype_name

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Appended bytes on their way to the device, over all layers; beyond it an append waits.
_MOST_PENDING_NBYTES = 256 << 20


class Records(Protocol):
    """Where a sequence gets its extents and leaves its record; the store's catalog."""

    def allocate(self, sizes: Sizes[int]) -> list[int]: ...
    def publish_sequence(self, name: str, record: SequenceRecord) -> None: ...
    def drop_sequence(self, name: str, offsets: Sizes[int]) -> None: ...
    def commit(self, timeout_s: float | None = None) -> None: ...


class Host(Protocol):
    """What a sequence stands on; a :class:`KVStore`."""

    engine: Engine
    staging: StagingPool
    verify: bool

    @property
    def catalog(self) -> Records: ...
    def forget_sequence(self, sequence: Sequence) -> None: ...
    def run_in_background(self, work: Callable[[], T]) -> Future[T]: ...


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
        self._deleted = False
        step = layout.extents_per_layer
        self._layers = [
            LayerCache(
                f"sequence {name!r}, layer {number}",
                store.engine,
                store.staging,
                layout,
                offsets[number * step : (number + 1) * step],
                store.verify,
            )
            for number in range(layout.shape.layers)
        ]
        # Tokens of each layer that the last record covers; see truncate.
        self._recorded = [0] * layout.shape.layers
        self._writing: deque[LayerCache] = deque()

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
        sequence = cls(store, name, layout, offsets, temporary)
        sequence.dirty = not temporary
        return sequence

    @classmethod
    def restored(cls, store: Host, name: str, record: SequenceRecord) -> Sequence:
        """A recorded sequence, as it was at its last flush. Blocks on the device."""
        granularity: Granularity = "head" if record.granularity == "head" else "layer"
        layout = SequenceLayout(record.shape, granularity, record.chunk_nbytes)
        if store.engine.segment_nbytes % layout.chunk_nbytes:
            raise ShapeMismatch(
                f"sequence {name!r} has checksums per {layout.chunk_nbytes} bytes; open the store "
                f"with segments that are a multiple of it, not {store.engine.segment_nbytes}"
            )
        if len(record.units) != layout.extents:
            raise CorruptionError(f"the index gives sequence {name!r} a wrong number of extents")
        sequence = cls(store, name, layout, [unit.offset for unit in record.units], False)
        step, at = layout.extents_per_layer, 0
        for number, layer in enumerate(sequence._layers):
            units = record.units[number * step : (number + 1) * step]
            nbytes = units[0].nbytes // layout.row_nbytes * record.shape.batch * 4
            layer.restore(units, record.row_map[at : at + nbytes] if record.row_map else b"")
            at += nbytes
            sequence._recorded[number] = layer.tokens
        return sequence

    # -- what it is -----------------------------------------------------------------------------

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
        GPU, and while more than 256 MiB wait to be written. Raises ShapeMismatch and CapacityError
        (more than ``max_tokens``) before anything is changed, and the error of an earlier write.
        """
        cache = self._layer(layer)
        self._check_tokens(k, "k")
        self._check_tokens(v, "v")
        if k.shape != v.shape:
            raise ShapeMismatch(f"k is {list(k.shape)}, but v {list(v.shape)}")
        with cache.lock:
            if cache.tokens + k.shape[2] > self.shape.max_tokens:
                raise CapacityError(
                    f"{cache.name}: {cache.tokens} tokens and {k.shape[2]} more exceed max_tokens "
                    f"{self.shape.max_tokens}"
                )
            if not k.shape[2]:
                return
            cache.settle(wait=False)
            before = cache.pending_nbytes
            cache.append(k.detach(), v.detach())
            wrote = cache.pending_nbytes > before
        self.dirty = not self.temporary
        if wrote:
            self._writing.append(cache)
            self._limit_pending()

    def append_async(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Future[None]:
        """As :meth:`append`, but returns a future; appends to one layer must not overtake."""
        return self._store.run_in_background(lambda: self.append(layer, k, v))

    def _limit_pending(self) -> None:
        pending = sum(cache.pending_nbytes for cache in self._layers)
        while pending > _MOST_PENDING_NBYTES and self._writing:
            cache = self._writing.popleft()
            with cache.lock:
                pending -= cache.pending_nbytes
                cache.settle()
        while len(self._writing) > len(self._layers):
            self._writing.popleft()

    def _check_tokens(self, tensor: torch.Tensor, what: str) -> None:
        shape = self.shape
        wanted = (shape.batch, shape.kv_heads, tensor.shape[2] if tensor.dim() == 4 else -1)
        if tensor.dim() != 4 or tuple(tensor.shape) != (*wanted, shape.head_dim):
            raise ShapeMismatch(
                f"{what} is {list(tensor.shape)}; wanted is [batch={shape.batch}, "
                f"kv_heads={shape.kv_heads}, tokens, head_dim={shape.head_dim}]"
            )
        if dtype_name(tensor.dtype) != shape.dtype:
            raise ShapeMismatch(f"{what} is {tensor.dtype}; the sequence holds {shape.dtype}")

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
        tensor; the memory is theirs. Blocks, briefly if the layer was prefetched. Raises
        ShapeMismatch, CorruptionError, DeviceError, and the error of a failed append.
        """
        import torch

        cache = self._layer(layer)
        wanted = self._heads(heads)
        if device is not None:
            self._store.staging.pin_for_gpu()
        with cache.lock:
            first, last = self._tokens(cache, tokens)
            if wanted is not None and self.granularity == "head":
                k, v = self._read_heads(cache, first, last, wanted)
            else:
                k, v = self._read_all(cache, first, last)
        if wanted is not None and self.granularity == "layer":
            index = torch.tensor(wanted, dtype=torch.long)
            k, v = k.index_select(1, index), v.index_select(1, index)
        return (k, v) if device is None else (k.to(device), v.to(device))

    def read_async(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
    ) -> Future[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`read`, but returns a future."""
        return self._store.run_in_background(
            lambda: self.read(layer, tokens=tokens, heads=heads, device=device)
        )

    def prefetch(self, layers: Iterable[int], *, spare_tokens: int = 1) -> None:
        """Starts to read all tokens of ``layers``, after what is read on demand. Returns at once.

        The next :meth:`read` of such a layer takes them over, together with up to
        ``spare_tokens`` appended in between. The memory is held until then.
        """
        for number in layers:
            cache = self._layer(number)
            with cache.lock:
                cache.prefetch(min(spare_tokens, self.shape.max_tokens - cache.tokens))

    def _read_all(
        self, cache: LayerCache, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reading = cache.take_prefetched() if first == 0 else None
        if reading is None:
            reading = cache.plan(first, last, range(len(cache.offsets)), 0)
        cache.extend(reading, last)
        # What was still being written is read only now.
        cache.settle()
        cache.extend(reading, last)
        rows = cache.finish(reading, last)
        if self.granularity == "head":
            heads = self.shape.kv_heads
            return rows[:heads].permute(2, 0, 1, 3), rows[heads:].permute(2, 0, 1, 3)
        return rows[0].permute(1, 2, 0, 3), rows[1].permute(1, 2, 0, 3)

    def _read_heads(
        self, cache: LayerCache, first: int, last: int, wanted: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        cache.settle()
        starts = [0, self.shape.kv_heads]
        readings = [
            cache.plan(first, last, range(start + head, start + head + 1), 0)
            for start in starts
            for head in wanted
        ]
        for reading in readings:
            cache.extend(reading, last)
        rows = [cache.finish(reading, last) for reading in readings]
        if not wanted:
            shape = (self.shape.batch, 0, last - first, self.shape.head_dim)
            empty = torch.empty(shape, dtype=getattr(torch, self.shape.dtype))
            return empty, empty.clone()
        k, v = torch.cat(rows[: len(wanted)]), torch.cat(rows[len(wanted) :])
        return k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, tokens: int, *, layer: int | None = None) -> None:
        """Forgets all tokens from ``tokens`` on, in ``layer`` or in all. May block on the device.

        Raises ShapeMismatch where there are fewer.
        """
        numbers = range(len(self._layers)) if layer is None else [self._number(layer)]
        for number in numbers:
            cache = self._layer(number)
            with cache.lock:
                if not 0 <= tokens <= cache.tokens:
                    raise ShapeMismatch(f"{cache.name} has {cache.tokens} tokens, not {tokens}")
        recorded = False
        for number in numbers:
            cache = self._layer(number)
            with cache.lock:
                if tokens == cache.tokens:
                    continue
                cache.truncate(tokens)
                recorded = recorded or tokens < self._recorded[number]
        self.dirty = not self.temporary
        if recorded:
            # The next append writes where the last record still points: that record goes first.
            self.stage_for_commit()
            self._store.catalog.commit()

    def reorder(self, rows: Iterable[int], *, layer: int | None = None) -> None:
        """Row ``b`` of the batch becomes what row ``rows[b]`` was (beam search). No I/O.

        Raises ShapeMismatch unless there is one row of the batch for each.
        """
        index = np.asarray([operator.index(row) for row in rows], dtype=np.int64)
        batch = self.shape.batch
        if index.shape != (batch,) or index.min() < 0 or index.max() >= batch:
            raise ShapeMismatch(f"reorder takes {batch} rows from 0 to {batch - 1}, not {index}")
        for number in range(len(self._layers)) if layer is None else [self._number(layer)]:
            cache = self._layer(number)
            with cache.lock:
                cache.reorder(index)
        self.dirty = not self.temporary

    def delete(self) -> None:
        """Gives the extents back; the sequence is of no use afterwards. May be called twice."""
        if self._deleted:
            return
        self._deleted = True
        for cache in self._layers:
            with cache.lock:
                cache.abandon()
        self._store.catalog.drop_sequence(self.name, self._offsets)
        self._store.forget_sequence(self)

    # -- lasting --------------------------------------------------------------------------------

    def stage_for_commit(self) -> None:
        """Writes what is only in memory and gives the catalog the record for its next commit.

        Part of :meth:`KVStore.flush`. Blocks on the device.
        """
        if self.temporary or self._deleted or not self.dirty:
            return
        self.dirty = False
        try:
            units, maps, recorded = [], [], []
            for cache in self._layers:
                with cache.lock:
                    units += cache.write_tail()
                    maps.append(cache.row_map())
                    recorded.append(cache.tokens)
        except BaseException:
            self.dirty = True
            raise
        if any(maps):
            identity = np.arange(self.shape.batch, dtype="<i4")
            maps = [
                found or np.tile(identity, (tokens, 1)).tobytes()
                for found, tokens in zip(maps, recorded, strict=True)
            ]
        record = SequenceRecord(
            self.shape,
            self.granularity,
            self._layout.chunk_nbytes,
            self._layout.extent_nbytes,
            tuple(units),
            b"".join(maps),
        )
        self._store.catalog.publish_sequence(self.name, record)
        self._recorded = recorded

    # -- arguments ------------------------------------------------------------------------------

    def _number(self, layer: int) -> int:
        number = operator.index(layer)
        if not 0 <= number < len(self._layers):
            raise ShapeMismatch(f"sequence {self.name!r} has layers 0 to {len(self._layers) - 1}")
        return number

    def _layer(self, layer: int) -> LayerCache:
        if self._deleted:
            raise ClosedError(f"sequence {self.name!r} was deleted")
        return self._layers[self._number(layer)]

    def _tokens(self, cache: LayerCache, tokens: slice | None) -> tuple[int, int]:
        if tokens is None:
            return 0, cache.tokens
        first, last, step = tokens.indices(cache.tokens)
        if step != 1:
            raise ShapeMismatch(f"a slice of tokens has step 1, not {step}")
        return first, max(first, last)

    def _heads(self, heads: Iterable[int] | slice | None) -> list[int] | None:
        if heads is None:
            return None
        count = self.shape.kv_heads
        if isinstance(heads, slice):
            return list(range(*heads.indices(count)))
        wanted = [operator.index(head) for head in heads]
        if any(not 0 <= head < count for head in wanted):
            raise ShapeMismatch(f"heads are 0 to {count - 1}, not {wanted}")
        return wanted
