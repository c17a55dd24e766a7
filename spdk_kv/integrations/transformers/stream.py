"""A model's K/V on a store, streamed past it layer by layer while it computes."""

from __future__ import annotations

import time
import uuid
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Rows
from contextlib import suppress
from dataclasses import replace

import torch

from spdk_kv.errors import CapacityError, ClosedError, KeyNotFound, ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers.earlier import Earlier
from spdk_kv.integrations.transformers.granularity import fastest_granularity
from spdk_kv.integrations.transformers.kept import Kept
from spdk_kv.integrations.transformers.lifetime import delete_in_thread, outside_inference
from spdk_kv.integrations.transformers.options import (
    StreamCounters,
    StreamOptions,
    half_way,
    no_room,
    too_large,
)
from spdk_kv.integrations.transformers.shapes import changed, guessed, shape_of
from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.types import KVShape

Pair = tuple[torch.Tensor, torch.Tensor]


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
        self._device: torch.device | None = None  # None for host memory
        self._written: int | None = None
        self._granularity = options.granularity
        # Of a sequence that is not this stream's, yet or any more, and is to be deleted.
        self._spare_name: str | None = None
        self._sequence: Sequence | None = None
        self._earlier = Earlier()
        self._finalizer: weakref.finalize[[Sequence], LayerStream] | None = None
        self.before_append: Callable[[Sequence, int, int, int], None] | None = None
        """Called before a layer of the sequence gets tokens, with how many it has, how many it
        gets, and the rows of the batch."""
        self._let_go = False

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
        own = 0 if self._sequence is None else self._sequence.tokens(layer)
        return self._earlier.tokens + own

    @property
    def resident_layers(self) -> int:
        """Layers whose K/V is in memory now: kept, lent to the model, or read ahead."""
        self._lent = {n: ks for n, ks in self._lent.items() if any(k() is not None for k in ks)}
        ahead = () if self._ahead is None else (self._ahead,)
        return len({*self._kept, *self._lent, *ahead})

    # -- tokens ---------------------------------------------------------------------------------

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Adds tokens, ``[batch, kv_heads, tokens, width]`` each, and returns what the layer's
        attention sees: the window (all tokens where there is none) before them, and them. Width and
        dtype may be others for K than for V, and for other layers.

        They are on the device of ``k``, with the strides of how they are kept. Blocks on the
        drive for what was not read ahead, and for the write of the layer before. Raises
        CapacityError and ShapeMismatch before anything is changed, and the store's errors.
        """
        sequence = self._sequence or self._create(k, v)
        self._device = None if k.device.type == "cpu" else k.device
        past, count = self.tokens(layer), k.shape[2]
        self._check(layer, past, k)
        if past == 0:
            sequence = self._fitted(sequence, layer, k, v)
        if self._written is not None and self._written != layer:
            # Its memory is given back first: two resident layers leave no room for a third.
            sequence.settle(self._written)
        self._written = layer
        if self.before_append is not None:
            self.before_append(sequence, past, count, k.shape[0])
        sequence.append(layer, k, v)
        if self.options.resident_layers == 1:
            sequence.settle(layer)
        self.counters.appended_nbytes += k.nbytes + v.nbytes
        keys, values = self._attended(sequence, layer, past, k, v)
        self._read_ahead(sequence, layer, count if past else 1)
        now = self.resident_layers
        self.counters.resident_layers_peak = max(self.counters.resident_layers_peak, now)
        return keys, values

    def _attended(
        self, sequence: Sequence, layer: int, past: int, k: torch.Tensor, v: torch.Tensor
    ) -> Pair:
        """What the tokens ``k``, ``v`` see, which were appended after ``past``."""
        count, first = k.shape[2], self._first(layer, past)
        kept_tokens, kept = self._kept.get(layer, (0, None))
        if kept is not None and kept_tokens == past > first:
            kept = kept[0].followed_by(k, past - first), kept[1].followed_by(v, past - first)
            keys, values = kept[0].tensor, kept[1].tensor
        else:
            if first == past:
                keys, values = k, v
            else:
                keys, values = self._read(sequence, layer, first)
            if layer < self.kept_layers:
                kept = Kept(keys.contiguous()), Kept(values.contiguous())
        if layer < self.kept_layers:
            assert kept is not None
            self._kept[layer] = past + count, kept
        self._lent[layer] = (weakref.ref(keys), weakref.ref(values))
        return keys, values

    def held(self, layer: int) -> Pair | None:
        """What the next token of ``layer`` will see of those before it, or None without any. Blocks
        on the drive."""
        tokens = self.tokens(layer)
        if self._sequence is None or not tokens:
            return None
        if self._ahead == layer:
            self._ahead = None  # this read takes it over
        first = self._first(layer, tokens)
        return self._earlier.read_on(self._sequence, layer, first, self._device)

    def _first(self, layer: int, tokens: int) -> int:
        """The first of ``tokens`` that the next one still sees."""
        window = self.options.windows[layer]
        return 0 if window is None else max(0, tokens - window + 1)

    def _read(self, sequence: Sequence, layer: int, first: int) -> Pair:
        if self._ahead == layer:
            self.counters.prefetch_hits += 1
            self._ahead = None
        else:
            self.counters.prefetch_misses += 1
        begin = time.perf_counter()
        keys, values = self._earlier.read_on(sequence, layer, first, self._device)
        self.counters.read_wait_s += time.perf_counter() - begin
        self.counters.read_nbytes += keys.nbytes + values.nbytes
        return keys, values

    def _read_ahead(self, sequence: Sequence, layer: int, spare: int) -> None:
        if self.options.resident_layers == 1 or self.kept_layers == self.layers:
            return
        ahead = max((layer + 1) % self.layers, self.kept_layers)
        tokens, before = self.tokens(ahead), self._earlier.tokens
        first = self._first(ahead, tokens)
        if ahead in (self._ahead, layer) or first == tokens:
            return
        self._earlier.prefetch(ahead, first)
        sequence.prefetch([ahead], first_token=max(0, first - before), spare_tokens=spare)
        self._ahead = ahead

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, count: int) -> None:
        """Forgets the newest ``count`` tokens of all layers. Blocks on the drive.

        Also evens out the layers after a forward pass that ended half way.
        """
        self._delete_spare()
        if self._sequence is None:
            return
        lengths = [self.tokens(layer) for layer in range(self.layers)]
        left = max(0, min(lengths[0] - count, *lengths))
        if left == max(lengths):
            return
        # What is kept of a windowed layer does not reach back far enough, so it is read again.
        self._drop_resident()
        self._sequence.truncate(max(0, left - self._earlier.tokens))
        self._earlier.truncate(left)
        self._read_ahead(self._sequence, self.layers - 1, 1)

    def reorder(self, rows: Rows[int]) -> None:
        """Row ``b`` of the batch becomes what row ``rows[b]`` was. No I/O."""
        if self._sequence is None or list(rows) == list(range(self._sequence.shape.batch)):
            return
        # Not there meanwhile: an interrupt costs a read, and no layer has another order.
        kept, self._kept = self._kept, {}
        self._earlier.reorder(rows)
        self._sequence.reorder(rows)
        for layer, (tokens, (k, v)) in kept.items():
            index = torch.tensor(rows, device=k.tensor.device)
            keys, values = (each.tensor.index_select(0, index) for each in (k, v))
            kept[layer] = tokens, (Kept(keys), Kept(values))
        self._kept = kept

    def select(self, rows: Rows[int]) -> None:
        """The batch becomes the ``rows`` of what it was, in that order.

        Another number of rows needs another layout, and so another sequence for what is to come;
        what there is stays where it is. A lasting one is copied on the drive, layer by layer, which
        needs room for both meanwhile. Raises CapacityError.
        """
        old = self._sequence
        if old is None:
            return
        if len(rows) == old.shape.batch:
            self.reorder(rows)
            return
        self.truncate(0)
        self._drop_resident()
        shape = replace(old.shape, batch=len(rows))
        if not old.temporary:
            self._replace(old, shape, list(rows))
            return
        new = self._open(replace(shape, max_tokens=None))
        stretches = self._earlier.grown(old, rows, old.tokens(0))
        left = None if old.tokens(0) else old.name
        self._earlier.stretches, self._sequence, self._spare_name = stretches, new, left
        self._detach()
        self._own(new)
        self._delete_spare()

    def _replace(self, old: Sequence, shape: KVShape, rows: list[int]) -> None:
        """The ``rows`` of a lasting sequence become one of ``shape``, of the same name. Where there
        is no room for both, it stays as it was."""
        name = old.name
        copy = self._made(f"{name}/rows-{uuid.uuid4().hex}", shape, temporary=True)
        try:
            for layer in range(self.layers):
                k, v = old.read(layer)
                copy.append(layer, k[rows], v[rows])
                copy.settle(layer)
            old.delete()
            self._sequence = None
            self._take(outside_inference(lambda: copy.fork(name)))
        finally:
            copy.delete()

    def take_fork(self, other: LayerStream, tokens: int) -> None:
        """This stream, which has nothing yet, begins with the first ``tokens`` of ``other``. Copies
        nothing but unfinished chunks; may block on the drive."""
        parent = other.sequence
        if parent is None:
            return
        stretches = outside_inference(lambda: other._earlier.forked(tokens, self._earlier))
        rest = max(0, tokens - other._earlier.tokens)
        own = outside_inference(lambda: parent.fork(tokens=rest))
        self._earlier.stretches, self._sequence = stretches, own
        self._own(own)

    def _copy(self, old: Sequence, shape: KVShape, layers: int, rows: list[int]) -> Sequence:
        """The first ``layers`` of ``old`` become a sequence of ``shape``, which takes its place."""
        new = self._open(shape)
        try:
            for layer in range(layers):
                k, v = old.read(layer)
                new.append(layer, k[rows], v[rows])
                new.settle(layer)
        except BaseException:
            new.delete()
            raise
        self._detach()
        self._take(new)
        self._delete_spare()
        return new

    def clear(self) -> None:
        """Deletes the sequence; the next :meth:`update` creates another one, of any batch."""
        self._drop_resident()
        self._delete_spare()
        sequence = self._sequence
        if sequence is not None:
            # An interrupt between the first two leaves it to the finalizer, or to the next of its
            # name; one after them to the next call that needs a sequence.
            earlier = [each.sequence for each in self._earlier.stretches]
            self._earlier.stretches, self._sequence, self._spare_name = (), None, sequence.name
            sequence.delete()
            self._spare_name = None
            self._detach()
            for each in earlier:
                each.delete()
            self._earlier.let_go()

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
        self._let_go = True

    def _drop_resident(self) -> None:
        self._kept.clear()
        self._lent.clear()
        self._ahead = self._written = None

    # -- the sequence ---------------------------------------------------------------------------

    def _create(self, k: torch.Tensor, v: torch.Tensor) -> Sequence:
        name = self.options.name
        if name is not None and self._let_go:
            raise ClosedError(f"the cache {name!r} was closed: make it again to go on from it")
        layers = guessed([shape_of(k, v)], self.options.windows)
        batch, _, count, _ = k.shape
        most = self.options.max_tokens
        if most is not None and count > most:
            raise no_room(most, count)
        if name is not None:
            with suppress(KeyNotFound):  # what was not taken up gives way
                outside_inference(lambda: self._store.sequence(name)).delete()
        shape = KVShape.of_layers(layers, most, batch)
        self._granularity = self.options.granularity or fastest_granularity(shape, k.device)
        sequence = self._open(shape)
        self._take(sequence)
        return sequence

    def _fitted(self, sequence: Sequence, layer: int, k: torch.Tensor, v: torch.Tensor) -> Sequence:
        """The sequence, or one with another shape of ``layer``, if its first tokens are not as they
        were guessed. What the layers before it hold is copied, once or twice in a first pass."""
        come = shape_of(k, v)
        if layer == 0 or sequence.shape.layer(layer) == come:
            return sequence
        shape = changed(sequence.shape, layer, come, self.options.windows)
        self._drop_resident()
        if sequence.temporary:
            return self._copy(sequence, shape, layer, list(range(shape.batch)))
        # Two cannot have the same name.
        before = [sequence.read(number) for number in range(layer)]
        note = sequence.note
        self.clear()
        fitted = self._open(shape, new=True)
        self._take(fitted)
        fitted.note = note
        for number, pair in enumerate(before):
            fitted.append(number, *pair)
        return fitted

    def _open(self, shape: KVShape, new: bool = False) -> Sequence:
        """The sequence, created if nobody did; ``new`` says that nobody did."""
        self._delete_spare()
        name = self.options.name or f"layer-stream-{uuid.uuid4().hex}"
        if new or self.options.name is None:
            self._spare_name = name
        temporary = self.options.name is None
        try:
            return self._made(name, shape, temporary)
        except CapacityError as error:
            if shape.max_tokens is None:
                raise
            raise too_large(error, shape) from error

    def _made(self, name: str, shape: KVShape, temporary: bool) -> Sequence:
        kind, make = self._granularity, self._store.sequence
        return outside_inference(lambda: make(name, shape, granularity=kind, temporary=temporary))

    def resume(self, name: str, tokens: int) -> int:
        """Takes up the lasting sequence ``name`` with its first ``tokens`` tokens, or as many as it
        has. Returns how many. Blocks on the drive.

        Raises ShapeMismatch where it has other layers or less room, and the store's errors.
        """
        sequence = outside_inference(lambda: self._store.sequence(name))
        shape, wanted = sequence.shape, self.options.max_tokens
        if shape.layers != self.layers:
            raise ShapeMismatch(
                f"sequence {name!r} has {shape.layers} layers, the model {self.layers}"
            )
        if wanted is not None and shape.max_tokens is not None and wanted > shape.max_tokens:
            raise ShapeMismatch(
                f"sequence {name!r} was made for {shape.max_tokens} tokens, not {wanted}"
            )
        return self.adopt(sequence, tokens)

    def adopt(self, sequence: Sequence, tokens: int) -> int:
        """Goes on from the first ``tokens`` tokens of ``sequence``, or as many as it has, which is
        this stream's from now on. Returns how many."""
        self._take(sequence)
        # A crash may have come between two layers of a forward pass.
        self.truncate(0)
        self.truncate(max(0, self.tokens(0) - tokens))
        return self.tokens(0)

    def _delete_spare(self) -> None:
        """Deletes a sequence that an interrupt has left behind."""
        if self._spare_name is not None:
            with suppress(KeyNotFound, ClosedError):  # a store that is closed has none any more
                self._store.sequence(self._spare_name).delete()
        self._spare_name = None

    def _take(self, sequence: Sequence) -> None:
        before = self._sequence
        self._sequence, self._spare_name = sequence, None if before is None else before.name
        self._own(sequence)

    def _own(self, sequence: Sequence) -> None:
        """A temporary sequence goes with this stream."""
        self._granularity = sequence.granularity
        sequence.read_ahead = False  # this class decides which layers are in memory
        if sequence.temporary:
            self._finalizer = weakref.finalize(self, delete_in_thread, sequence)
            self._finalizer.atexit = False  # closing the store deletes it

    def _detach(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None

    def _check(self, layer: int, past: int, k: torch.Tensor) -> None:
        room, count = self.options.max_tokens, k.shape[2]
        if room is not None and past + count > room:
            raise no_room(room, past + count)
        before, wanted = (layer - 1, past + count) if layer else (self.layers - 1, past)
        if self.layers > 1 and self.tokens(before) != wanted:
            raise half_way(layer, past, before, self.tokens(before))
        if torch.is_grad_enabled() and k.requires_grad:
            raise SpdkKvError(
                "K/V that went to the drive has no gradients: run the model under torch.no_grad() "
                "or torch.inference_mode()"
            )
