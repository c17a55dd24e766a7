"""A model's K/V on a store, streamed past it layer by layer while it computes."""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Rows
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from spdk_kv.errors import CapacityError, KeyNotFound, ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers.granularity import fastest_granularity
from spdk_kv.integrations.transformers.kept import Kept
from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.types import Granularity, KVShape
from spdk_kv.units import format_nbytes

log = logging.getLogger(__name__)

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StreamOptions:
    """How a :class:`LayerStream` is laid out.

    ``windows``: for each layer, how many tokens its attention sees, the newest one included, or
    None for all. ``max_tokens``: the capacity, reserved at once; None lets it grow as tokens come.
    ``resident_layers``: layers whose K/V may be in memory at once.
    ``name``: of a lasting sequence. ``granularity``: of a new one; None is the fastest.
    """

    windows: tuple[int | None, ...]
    max_tokens: int | None
    resident_layers: int
    name: str | None
    granularity: Granularity | None


@dataclass
class StreamCounters:
    """What a stream did. ``prefetch_hits``: reads of a layer that had been prefetched;
    ``read_wait_s``: seconds spent waiting in reads; bytes are those of K and V together."""

    resident_layers_peak: int = 0
    prefetch_hits: int = 0
    prefetch_misses: int = 0
    appended_nbytes: int = 0
    read_nbytes: int = 0
    read_wait_s: float = 0.0


class LayerStream:
    """K and V of all layers in one sequence, created at the first :meth:`update`.

    Every scan updates the layers in order. With ``n`` resident layers one is being computed and
    one being read ahead; the first ``n - 2`` stay in memory for good. Keeping the layers used last
    instead would never hit, since scans are cyclic. With one resident layer there is no reading
    ahead, and with as many as the model has nothing is read back. For one thread at a time.
    """

    def __init__(self, store: KVStore, options: StreamOptions) -> None:
        layers, resident = len(options.windows), options.resident_layers
        self.options = options
        self.kept_layers = layers if resident >= layers else max(0, resident - 2)
        self.counters = StreamCounters()
        self._store = store
        # With the number of tokens up to which it reaches: what a pass that was interrupted left
        # behind is not taken for another's.
        self._kept: dict[int, tuple[int, tuple[Kept, Kept]]] = {}
        self._lent: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]]] = {}
        self._ahead: int | None = None
        self._written: int | None = None
        self._granularity = options.granularity
        # Of a sequence that is not this stream's, yet or any more, and is to be deleted.
        self._spare_name: str | None = None
        self._sequence: Sequence | None = None
        self._finalizer: weakref.finalize[[Sequence], LayerStream] | None = None
        if options.name is not None and options.name in store.sequences():
            self._resume(options.name)

    # -- properties -----------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        return len(self.options.windows)

    @property
    def sequence(self) -> Sequence | None:
        """The sequence, once there is one."""
        return self._sequence

    def tokens(self, layer: int) -> int:
        """Tokens that ``layer`` holds."""
        return 0 if self._sequence is None else self._sequence.tokens(layer)

    @property
    def resident_layers(self) -> int:
        """Layers whose K/V is in memory now: kept, lent to the model, or read ahead."""
        self._lent = {n: ks for n, ks in self._lent.items() if any(k() is not None for k in ks)}
        ahead = () if self._ahead is None else (self._ahead,)
        return len({*self._kept, *self._lent, *ahead})

    # -- tokens ---------------------------------------------------------------------------------

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Adds tokens, ``[batch, kv_heads, tokens, head_dim]`` each, and returns what the layer's
        attention sees: the window (all tokens where there is none) before them, and them.

        They are on the device of ``k``, with the strides of how they are kept. Blocks on the
        drive for what was not read ahead, and for the write of the layer before. Raises
        CapacityError and ShapeMismatch before anything is changed, and the store's errors.
        """
        sequence = self._sequence or self._create(k, v)
        past, count = sequence.tokens(layer), k.shape[2]
        self._check(layer, sequence, past, k)
        if self._written is not None and self._written != layer:
            # Its memory is given back first: two resident layers leave no room for a third.
            sequence.settle(self._written)
        self._written = layer
        sequence.append(layer, k, v)
        if self.options.resident_layers == 1:
            sequence.settle(layer)
        self.counters.appended_nbytes += 2 * k.nbytes
        first = self._first(layer, past)
        kept_tokens, kept = self._kept.get(layer, (0, None))
        if kept is not None and kept_tokens == past > first:
            kept = kept[0].followed_by(k, past - first), kept[1].followed_by(v, past - first)
            keys, values = kept[0].tensor, kept[1].tensor
        else:
            if first == past:
                keys, values = k, v
            else:
                keys, values = self._read(sequence, layer, first, k.device)
            if layer < self.kept_layers:
                kept = Kept(keys.contiguous()), Kept(values.contiguous())
        if layer < self.kept_layers:
            assert kept is not None
            self._kept[layer] = past + count, kept
        self._lent[layer] = (weakref.ref(keys), weakref.ref(values))
        self._read_ahead(sequence, layer, count if past else 1)
        now = self.resident_layers
        self.counters.resident_layers_peak = max(self.counters.resident_layers_peak, now)
        return keys, values

    def _first(self, layer: int, tokens: int) -> int:
        """The first of ``tokens`` that the next one still sees."""
        window = self.options.windows[layer]
        return 0 if window is None else max(0, tokens - window + 1)

    def _read(self, sequence: Sequence, layer: int, first: int, device: torch.device) -> Pair:
        if self._ahead == layer:
            self.counters.prefetch_hits += 1
            self._ahead = None
        else:
            self.counters.prefetch_misses += 1
        begin = time.perf_counter()
        target = None if device.type == "cpu" else device
        keys, values = sequence.read(layer, tokens=slice(first, None), device=target)
        self.counters.read_wait_s += time.perf_counter() - begin
        self.counters.read_nbytes += keys.nbytes + values.nbytes
        return keys, values

    def _read_ahead(self, sequence: Sequence, layer: int, spare: int) -> None:
        if self.options.resident_layers == 1 or self.kept_layers == self.layers:
            return
        ahead = max((layer + 1) % self.layers, self.kept_layers)
        tokens = sequence.tokens(ahead)
        first = self._first(ahead, tokens)
        if ahead in (self._ahead, layer) or first == tokens:
            return
        sequence.prefetch([ahead], first_token=first, spare_tokens=spare)
        self._ahead = ahead

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, count: int) -> None:
        """Forgets the newest ``count`` tokens of all layers. Blocks on the drive.

        Also evens out the layers after a forward pass that ended half way.
        """
        if self._sequence is None:
            return
        lengths = [self._sequence.tokens(layer) for layer in range(self.layers)]
        left = max(0, min(lengths[0] - count, *lengths))
        if left == max(lengths):
            return
        # What is kept of a windowed layer does not reach back far enough, so it is read again.
        self._drop_resident()
        self._sequence.truncate(left)
        self._read_ahead(self._sequence, self.layers - 1, 1)

    def reorder(self, rows: Rows[int]) -> None:
        """Row ``b`` of the batch becomes what row ``rows[b]`` was. No I/O."""
        if self._sequence is None or list(rows) == list(range(self._sequence.shape.batch)):
            return
        # Not there meanwhile: an interrupt costs a read, and no layer has another order.
        kept, self._kept = self._kept, {}
        self._sequence.reorder(rows)
        for layer, (tokens, (k, v)) in kept.items():
            index = torch.tensor(rows, device=k.tensor.device)
            keys, values = (each.tensor.index_select(0, index) for each in (k, v))
            kept[layer] = tokens, (Kept(keys), Kept(values))
        self._kept = kept

    def select(self, rows: Rows[int]) -> None:
        """The batch becomes the ``rows`` of what it was, in that order.

        Another number of rows needs another layout: everything is copied on the drive, layer by
        layer, which needs room for both meanwhile. Raises CapacityError, and ShapeMismatch for a
        lasting sequence.
        """
        old = self._sequence
        if old is None:
            return
        if len(rows) == old.shape.batch:
            self.reorder(rows)
            return
        if not old.temporary:
            raise ShapeMismatch(
                f"the lasting sequence {old.name!r} has {old.shape.batch} rows for good, not "
                f"{len(rows)}: make the cache without name= to change its batch"
            )
        self._drop_resident()
        new = self._open(replace(old.shape, batch=len(rows)))
        try:
            for layer in range(self.layers):
                k, v = old.read(layer)
                new.append(layer, k[list(rows)], v[list(rows)])
                new.settle(layer)
        except BaseException:
            new.delete()
            raise
        self._detach()
        self._take(new)
        self._delete_spare()

    def clear(self) -> None:
        """Deletes the sequence; the next :meth:`update` creates another one, of any batch."""
        self._drop_resident()
        self._delete_spare()
        if self._sequence is not None:
            self._sequence.delete()
            self._detach()
            self._sequence = None

    def release(self) -> None:
        """Lets go of the sequence: a temporary one is deleted, a lasting one stays."""
        if self._sequence is None or self._sequence.temporary:
            self.clear()
            return
        if self._ahead is not None:
            # It will not be taken: a prefetch of nothing in its place frees the memory.
            self._sequence.prefetch([self._ahead], first_token=self.tokens(self._ahead))
        self._drop_resident()
        self._sequence = None

    def _drop_resident(self) -> None:
        self._kept.clear()
        self._lent.clear()
        self._ahead = self._written = None

    # -- the sequence ---------------------------------------------------------------------------

    def _create(self, k: torch.Tensor, v: torch.Tensor) -> Sequence:
        if k.shape != v.shape:
            raise ShapeMismatch(
                f"k is {list(k.shape)} but v is {list(v.shape)}: models whose keys and values "
                "differ in shape cannot be kept in a sequence"
            )
        batch, heads, count, head_dim = k.shape
        most = self.options.max_tokens
        if most is not None and count > most:
            raise _no_room(most, count)
        shape = KVShape(self.layers, heads, head_dim, k.dtype, most, batch)
        self._granularity = self.options.granularity or fastest_granularity(shape, k.device)
        sequence = self._open(shape)
        self._take(sequence)
        return sequence

    def _open(self, shape: KVShape) -> Sequence:
        self._delete_spare()
        name = self.options.name or f"layer-stream-{uuid.uuid4().hex}"
        if self.options.name is None:
            self._spare_name = name
        temporary = self.options.name is None
        try:
            return _outside_inference(
                lambda: self._store.sequence(
                    name, shape, granularity=self._granularity, temporary=temporary
                )
            )
        except CapacityError as error:
            if shape.max_tokens is None:
                raise
            raise CapacityError(
                f"{error}; {shape.max_tokens} tokens of {shape.layers} layers take "
                f"{format_nbytes(shape.nbytes)}: pass a smaller max_tokens=, or none to have room "
                "made as tokens come, or open the store with a larger capacity="
            ) from error

    def _resume(self, name: str) -> None:
        sequence = _outside_inference(lambda: self._store.sequence(name))
        shape, wanted = sequence.shape, self.options.max_tokens
        if shape.layers != self.layers:
            raise ShapeMismatch(
                f"sequence {name!r} has {shape.layers} layers, the model {self.layers}"
            )
        if wanted is not None and shape.max_tokens is not None and wanted > shape.max_tokens:
            raise ShapeMismatch(
                f"sequence {name!r} was made for {shape.max_tokens} tokens, not {wanted}"
            )
        self._take(sequence)
        # A crash may have come between two layers of a forward pass.
        self.truncate(0)

    def _delete_spare(self) -> None:
        """Deletes a sequence that an interrupt has left behind."""
        if self._spare_name is not None:
            with suppress(KeyNotFound):
                self._store.sequence(self._spare_name).delete()
        self._spare_name = None

    def _take(self, sequence: Sequence) -> None:
        before = self._sequence
        self._sequence, self._spare_name = sequence, None if before is None else before.name
        self._granularity = sequence.granularity
        sequence.read_ahead = False  # this class decides which layers are in memory
        if sequence.temporary:
            self._finalizer = weakref.finalize(self, _delete_in_thread, sequence)
            self._finalizer.atexit = False  # closing the store deletes it

    def _detach(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None

    def _check(self, layer: int, sequence: Sequence, past: int, k: torch.Tensor) -> None:
        room, count = sequence.shape.max_tokens, k.shape[2]
        if room is not None and past + count > room:
            raise _no_room(room, past + count)
        before, wanted = (layer - 1, past + count) if layer else (self.layers - 1, past)
        if self.layers > 1 and sequence.tokens(before) != wanted:
            raise SpdkKvError(
                f"layer {layer} follows {past} tokens, but layer {before} has "
                f"{sequence.tokens(before)}: an earlier forward pass ended half-way; crop(0) takes "
                "its tokens back, reset() forgets all"
            )
        if torch.is_grad_enabled() and k.requires_grad:
            raise SpdkKvError(
                "K/V that went to the drive has no gradients: run the model under torch.no_grad() "
                "or torch.inference_mode()"
            )


def _no_room(room: int, wanted: int) -> CapacityError:
    return CapacityError(
        f"the cache has room for {room} tokens per row, not for {wanted}: make it with "
        f"max_tokens={wanted} or more, or without"
    )


def _outside_inference(make: Callable[[], Sequence]) -> Sequence:
    # A tensor made in inference mode cannot be changed outside it, and a sequence's tails live
    # longer than one call of the model.
    with torch.inference_mode(False):
        return make()


def _delete_in_thread(sequence: Sequence) -> None:
    """Deletes the sequence of a stream that was dropped without :meth:`LayerStream.release`."""
    # The garbage collector may run in a thread that holds the store's locks.
    threading.Thread(target=_delete, args=(sequence,), name="spdk_kv-delete", daemon=True).start()


def _delete(sequence: Sequence) -> None:
    try:
        sequence.delete()
    except SpdkKvError as error:
        log.debug("deleting %s: %s", sequence.name, error)
