"""A sequence: the KV cache of one request or batch, layer by layer, on the drive."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import Deadline
from spdk_kv.errors import CapacityError, ShapeMismatch
from spdk_kv.sequence.arguments import batch_order, check_tokens, head_list, token_range
from spdk_kv.sequence.forks import share
from spdk_kv.sequence.group_calls import GroupCalls
from spdk_kv.sequence.growth import Growth
from spdk_kv.sequence.layer import Layer
from spdk_kv.sequence.twins import Twins
from spdk_kv.sequence.views import read_all, read_heads
from spdk_kv.types import Granularity

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# SQLite takes a row of 1 GB at most.
_MOST_NOTE_NBYTES = 256 << 20


class Sequence(GroupCalls, Twins):
    """The KV cache of one request or batch; :meth:`KVStore.sequence` makes one.

    Layers are independent of each other: they may hold different numbers of tokens, and threads
    that use different layers run in parallel. All methods are thread-safe.

    A layer whose write failed raises that error from then on: delete the sequence and compute it
    again. An interrupt (Ctrl-C) or a ``timeout_s`` that passes ends a call and nothing else: what
    was accepted before goes on, and a layer is as it was before the call or as it was to be.

    Attributes:
        name: The name it has in its store.
    """

    # -- properties -----------------------------------------------------------------------------

    @property
    def granularity(self) -> Granularity:
        """``layer``, ``head`` or ``token``: what lies contiguously."""
        return self._layout.granularity

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in all layers."""
        each = zip(self._body.states, self._layout.layers, strict=True)
        return sum(state.tokens * layout.token_nbytes for state, layout in each)

    def tokens(self, layer: int = 0) -> int:
        """Tokens appended to ``layer`` so far."""
        return self._body.states[self._usable_number(layer)].tokens

    @property
    def pinned(self) -> bool:
        """Whether it is kept where room is made for others; may be set. One that is in use is kept
        in any case, and a temporary one until it is deleted."""
        return self._recorder.pinned

    @pinned.setter
    def pinned(self, pinned: bool) -> None:
        self._usable_number(0)
        if bool(pinned) != self._recorder.pinned:
            self._mark_dirty()
            self._recorder.pinned = bool(pinned)

    @property
    def note(self) -> bytes:
        """What the caller wants to be recorded with the tokens, in one step with them: what they
        were computed from, say. Up to 256 MiB. Setting it does not block; a fork begins with its
        parent's."""
        return self._recorder.note

    @note.setter
    def note(self, note: bytes) -> None:
        if not isinstance(note, bytes):
            raise TypeError(f"a note is bytes, not {type(note).__name__}")
        if len(note) > _MOST_NOTE_NBYTES:
            raise ValueError(f"a note has at most {_MOST_NOTE_NBYTES} bytes, not {len(note)}")
        self._usable_number(0)
        if note != self._recorder.note:
            self._mark_dirty()
            self._recorder.note = note

    @property
    def read_ahead(self) -> bool:
        """Whether layers are read ahead unasked, in the order of the last scans; may be set, and
        :meth:`prefetch` turns it off."""
        return self._ahead.learns if "_ahead" in self.__dict__ else self._learns

    @read_ahead.setter
    def read_ahead(self, learns: bool) -> None:
        self._learns = learns
        if "_ahead" in self.__dict__:
            self._ahead.learns = learns

    def set_weight(self, layers: Iterable[int], weight: float) -> None:
        """Sets how much it matters that ``layers`` stay in the page cache.

        Heavier layers are kept first. Takes effect at the next decision of the residency policy.

        Args:
            layers: Numbers of layers.
            weight: Any finite number; 1.0 is the default.

        Raises:
            ValueError: ``weight`` is not finite.
            ShapeMismatch: There is no such layer.
        """
        if not math.isfinite(weight):
            raise ValueError(f"a weight is a finite number, not {weight}")
        for layer in layers:
            number = self._number(layer)
            for unit in self._body.group.layers[number]:
                unit.weight = float(weight)

    # -- appending ------------------------------------------------------------------------------

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, timeout_s: float | None = None
    ) -> None:
        """Adds tokens to a layer, all of them or (after any error or interrupt) none.

        Copies them and returns; the drive writes in the background. Blocks while more than 64 MiB
        of the layer, or 128 MiB of all sequences, wait to be written. Blocks for the copy from a
        GPU as well; over a link only for what does not fill a chunk.

        Args:
            layer: Number of the layer.
            k: Keys, ``[batch, kv_heads, tokens, head_dim]``, in the sequence's dtype, on any
                device.
            v: Values, likewise.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Raises:
            ShapeMismatch: A tensor does not fit the sequence's shape.
            CapacityError: More than ``max_tokens`` tokens.
            DeviceTimeout: There was no room within ``timeout_s``.
            DeviceError: A write failed, now or earlier: the layer is lost.
            ClosedError: The sequence was deleted, or the store closed.
        """
        deadline = Deadline(timeout_s)
        target = self._layer(layer, deadline)
        check_tokens(target.contents.layout, k, v)
        k, v = k.detach(), v.detach()
        self._host.paths.backlog.make_room(deadline)
        while not self._append(target, k, v, deadline):
            self._recorder.commit_if_due(deadline)
            self._grow(self._number(layer), k.shape[2], deadline)

    def _append(self, layer: Layer, k: torch.Tensor, v: torch.Tensor, deadline: Deadline) -> bool:
        """Whether it could be done: not before a record that is due was made, and not without room
        on the drive."""
        with deadline.hold(layer.lock):
            most, tokens = self.shape.max_tokens, layer.tokens + k.shape[2]
            if most is not None and tokens > most:
                raise CapacityError(
                    f"{layer.name}: {layer.tokens} tokens and {k.shape[2]} more exceed max_tokens "
                    f"{most}"
                )
            if self._recorder.must_record or not layer.has_room(tokens):
                layer.contents.check()
                return False
            layer.settle(wait=False)
            if k.shape[2]:
                self._mark_dirty()
                layer.append(k, v, self._host.links.of((k, v)), deadline)
            return True

    def _grow(self, number: int, count: int, deadline: Deadline) -> None:
        """Makes room for ``count`` tokens more in a layer."""
        layers = self._layers
        self._growth.extend(layers, number, layers[number].tokens + count, deadline)
        if self.temporary:
            left = self._growth.take_left()
            writes = [transfer for layer in layers for transfer in layer.unfinished]
            self._host.catalog.retire(left, writes)

    def settle(self, layer: int, *, timeout_s: float | None = None) -> None:
        """Blocks until all tokens appended to ``layer`` are written, and their copies in memory
        given back. They survive a power cut only after :meth:`KVStore.flush`.

        An interrupt or the timeout ends this wait only; the writes go on.

        Args:
            layer: Number of the layer.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Raises:
            DeviceTimeout: They were not all written within ``timeout_s``.
            DeviceError: A write failed: the layer is lost.
        """
        deadline = Deadline(timeout_s)
        target = self._layer(layer, deadline)
        with deadline.hold(target.lock):
            target.settle(deadline)

    # -- reading --------------------------------------------------------------------------------

    def read(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
        timeout_s: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads K and V of a layer. Blocks on the drive; briefly if the layer was prefetched.

        Args:
            layer: Number of the layer.
            tokens: Which tokens, a slice with step 1; all by default.
            heads: Which KV heads, in this order; all by default. With granularity ``layer`` all of
                them are read and some dropped; with ``head`` only those are read.
            device: Where the tensors are to be, as for ``torch.device``; host memory by default.
                To a GPU that the store reaches over a link, data is copied while the drive still
                reads, and only torch's current stream waits for the last copies.
            timeout_s: Seconds until the read is given up; None waits as long as it takes.

        Returns:
            K and V, ``[batch, kv_heads, tokens, head_dim]`` each. They own their memory, but are
            views of the order in which tokens lie on the drive: their strides are not those of a
            new tensor.

        Raises:
            ShapeMismatch: There is no such layer or head, or the slice has another step.
            CorruptionError: A checksum differs.
            DeviceTimeout: It took longer than ``timeout_s``.
            DeviceError: The drive failed, now or at an earlier append to the layer.
            ClosedError: The sequence was deleted, or the store closed.
        """
        deadline = Deadline(timeout_s)
        source = self._layer(layer, deadline)
        chosen = head_list(source.contents.layout.shape.kv_heads, heads)
        gpu = self._gpu(device)
        if device is not None and gpu is None:
            self._host.staging.pin_for_gpu()
        self._ahead.gpu = gpu
        number = self._number(layer)
        self._host.paths.before_read(self._body.group, number)
        with deadline.hold(source.lock), self._counting_corruption():
            first, last = token_range(source.tokens, tokens)
            if chosen is None:
                k, v = read_all(source, first, last, gpu, deadline)
            else:
                k, v = read_heads(source, first, last, chosen, gpu, deadline)
        self._ahead.after_read(number if tokens is None and chosen is None else None, deadline)
        # They are elsewhere if they were read ahead for another device.
        place = "cpu" if device is None else device
        return k.to(place), v.to(place)

    def prefetch(
        self,
        layers: Iterable[int],
        *,
        first_token: int = 0,
        spare_tokens: int = 1,
        timeout_s: float | None = None,
    ) -> None:
        """Starts to read layers ahead. Does not wait for the drive, but for other threads' calls
        on these layers.

        Layers are started in the order given, behind what is read on demand: as many as half of
        the store's ``staging`` memory has room for, at least one, and the others when reads have
        taken those over. If the last :meth:`read` went to a linked GPU they go there, and take as
        much of its memory. From now on nothing is read ahead unasked.

        The next :meth:`read` of such a layer that begins at ``first_token`` takes it over. The
        memory is held until then, or until a prefetch of the layer from another token; one from
        its end reads nothing. A sequence that was left alone for 2 s gives it up where others have
        no room.

        Args:
            layers: Numbers of layers.
            first_token: All tokens from this one on are read.
            spare_tokens: How many tokens may be appended before the read.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Raises:
            ShapeMismatch: There is no such layer, or a number of tokens is negative.
            DeviceTimeout: A layer was in use for longer than ``timeout_s``.
            ClosedError: The sequence was deleted, or the store closed.
        """
        if first_token < 0 or spare_tokens < 0:
            raise ShapeMismatch(f"tokens are counted from 0, not {min(first_token, spare_tokens)}")
        deadline = Deadline(timeout_s)
        numbers = [self._usable_number(layer) for layer in layers]
        self._ahead.ask(numbers, first_token, spare_tokens, deadline)

    # -- changing -------------------------------------------------------------------------------

    def truncate(
        self, tokens: int, *, layer: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Forgets all tokens from ``tokens`` on, in the last layer first. May block on the drive.

        After an interrupt or an error each layer has either its old tokens or ``tokens``, and the
        same call does the rest.

        Args:
            tokens: How many tokens stay.
            layer: Number of the layer; all layers by default.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Raises:
            ShapeMismatch: A layer has fewer tokens. Nothing is changed.
            DeviceTimeout: It took longer than ``timeout_s``. That layer and those before it are
                unchanged.
            DeviceError, CorruptionError: The chunk that is cut cannot be read. That layer and
                those before it are unchanged.
        """
        deadline = Deadline(timeout_s)
        numbers = self._numbers(layer, deadline)
        self._mark_dirty()
        with self._counting_corruption():
            self._whole.truncate(numbers, tokens, deadline)

    def reorder(
        self, rows: Iterable[int], *, layer: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Reorders the batch, as beam search does. No I/O, but waits for other threads' calls.

        If an interrupt or the timeout comes between two layers, the next call on the others does
        the rest first.

        Args:
            rows: Row ``b`` of the batch becomes what row ``rows[b]`` was.
            layer: Number of the layer; all layers by default.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Raises:
            ShapeMismatch: ``rows`` does not name one row for each row of the batch.
            DeviceTimeout: A layer was in use for longer than ``timeout_s``.
        """
        deadline = Deadline(timeout_s)
        index = batch_order(self.shape.batch, rows)
        numbers = self._numbers(layer, deadline)
        self._mark_dirty()
        self._whole.reorder(numbers, index, deadline)

    def fork(
        self,
        name: str | None = None,
        *,
        tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> Sequence:
        """A new sequence that begins with the first tokens of this one.

        They stay where they are, and both have them: nothing is copied but the unfinished last
        chunk of each layer. From then on neither sees what the other does; either may go on, be
        truncated or deleted first. Blocks until what was appended here is written.

        Args:
            name: The name of the new sequence; None makes a temporary one.
            tokens: How many tokens of each layer it has; as many as each has by default.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            The new sequence, of the same shape.

        Raises:
            NameInUse: There is a sequence of that name.
            ShapeMismatch: A layer has fewer tokens.
            CapacityError: There is no room for the unfinished chunks of one that lasts.
            DeviceTimeout: It took longer than ``timeout_s``.
            DeviceError, CorruptionError: A write failed, or the chunk that is cut cannot be read.
            ClosedError: The sequence was deleted, or the store closed.
        """
        deadline = Deadline(timeout_s)
        self._usable_number(0)
        self._whole.finish(deadline)

        def make(own_name: str, temporary: bool) -> Sequence:
            with self._counting_corruption():
                pieces, birth = share(
                    self._growth, self._layers, tokens, self._host.catalog, deadline
                )
            growth = Growth(self._host.catalog, self._layout, pieces)
            if not temporary:  # a flush is not to fail for want of it
                try:
                    growth.begin([each.tokens for each in birth], deadline)
                except BaseException:
                    self._host.catalog.abandon(growth.take_all())
                    raise
            made = Sequence(self._host, own_name, self._layout, growth, temporary, birth=birth)
            made._recorder.note = self._recorder.note
            made.mark_new()
            return made

        forked: Sequence = self._host.adopt_fork(self.name, name, make)
        return forked

    def delete(self) -> None:
        """Deletes the sequence and gives its extents back. May be called twice: a second call
        finishes what an interrupt (Ctrl-C) left.

        Its name is free at once, for a new sequence on other extents. Blocks only for calls on this
        one that are under way in other threads, and for a flush of it.

        Raises:
            ClosedError: The store is closed, and the sequence stays in it.
        """
        with self._recorder.lock:
            if not self.deleted and not self.temporary:
                self._host.check_open()
            self._recorder.deleted = True
            self._host.forget_sequence(self)
        writes: list[Transfer] = []
        if layers := self._body.made_layers:
            self._ahead.clear()
        for layer in layers:
            with layer.lock:
                writes += layer.close()
        self.release_units()
        # No call reaches the extents any more. Given back once, however many threads come here.
        with self._recorder.lock:
            offsets = [*self._growth.take_all(), *self._recorder.take_leaving()]
        if offsets:
            self._host.catalog.retire(offsets, writes)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"sequence {self.name!r} belongs to its store and cannot be pickled or copied: open "
            "the store in the worker with read_only=True, and the sequence there"
        )
