"""A sequence: the KV cache of one request or batch, layer by layer, on the drive."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from spdk_kv.errors import CapacityError, ClosedError, ShapeMismatch, SpdkKvError, is_unreadable
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import UnitGroup
from spdk_kv.placement import SequenceLayout
from spdk_kv.sequence.ahead import ReadAhead
from spdk_kv.sequence.arguments import batch_order, check_tokens, head_list, token_range
from spdk_kv.sequence.backlog import Backlog
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.layer import Layer
from spdk_kv.sequence.recorder import Recorder
from spdk_kv.sequence.views import read_all, read_heads
from spdk_kv.types import Granularity, KVShape

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Sequence:
    """The KV cache of one request or batch; :meth:`KVStore.sequence` makes one.

    Layers are independent of each other: they may hold different numbers of tokens, and threads
    that use different layers run in parallel. All methods are thread-safe.

    A layer whose write failed raises that error from then on, and so does one in which a change
    was interrupted half way (Ctrl-C): delete the sequence and compute it again.

    Attributes:
        name: The name it has in its store.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        layout: SequenceLayout,
        offsets: list[int],
        group: UnitGroup,
        layers: list[Layer],
        recorder: Recorder,
    ) -> None:
        self.name = name
        self._host = host
        self._layout = layout
        self._offsets = offsets
        self._group = group
        self._layers = layers
        self._recorder = recorder
        self._backlog = Backlog(layers)
        self._ahead = ReadAhead(host.paths, group, layers, layout.shape.max_tokens)

    # -- properties -----------------------------------------------------------------------------

    @property
    def shape(self) -> KVShape:
        """The shape that it was created with."""
        return self._layout.shape

    @property
    def granularity(self) -> Granularity:
        """``layer`` or ``head``: what one extent holds."""
        return self._layout.granularity

    @property
    def temporary(self) -> bool:
        """Whether it is gone when the store is closed."""
        return self._recorder.temporary

    @property
    def deleted(self) -> bool:
        """Whether :meth:`delete` was called."""
        return self._recorder.deleted

    @property
    def dirty(self) -> bool:
        """Whether it has changes that :meth:`KVStore.flush` would record."""
        return self._recorder.dirty

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in all layers."""
        return sum(2 * layer.tokens for layer in self._layers) * self.shape.token_nbytes

    def tokens(self, layer: int = 0) -> int:
        """Tokens appended to ``layer`` so far."""
        return self._layer(layer).tokens

    @property
    def read_ahead(self) -> bool:
        """Whether layers are read ahead unasked, in the order of the last scans; may be set, and
        :meth:`prefetch` turns it off."""
        return self._ahead.learns

    @read_ahead.setter
    def read_ahead(self, learns: bool) -> None:
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
            for unit in self._group.units[2 * number : 2 * number + 2]:
                unit.weight = float(weight)

    # -- appending ------------------------------------------------------------------------------

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Adds tokens to a layer.

        Copies them and returns; the drive writes in the background. Blocks while more than 64 MiB
        of the layer, or 128 MiB of the sequence, wait to be written. Blocks for the copy from a
        GPU as well; over a link only for what does not fill a chunk.

        Args:
            layer: Number of the layer.
            k: Keys, ``[batch, kv_heads, tokens, head_dim]``, in the sequence's dtype, on any
                device.
            v: Values, likewise.

        Raises:
            ShapeMismatch: A tensor does not fit the sequence's shape. Nothing is changed.
            CapacityError: More than ``max_tokens`` tokens. Nothing is changed.
            DeviceError: A write failed, now or earlier: the layer is lost.
            ClosedError: The sequence was deleted, or the store closed.
        """
        target = self._layer(layer)
        check_tokens(self.shape, k, v)
        k, v = k.detach(), v.detach()
        while not self._append(target, k, v):
            self._recorder.commit_if_due()
        self._recorder.mark_dirty()
        if target.writer.pending_nbytes:
            self._backlog.add(target)

    def _append(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether it could be done: not before a record that is due was made."""
        with layer.lock:
            if self._recorder.must_record:
                return False
            if layer.tokens + k.shape[2] > self.shape.max_tokens:
                raise CapacityError(
                    f"{layer.name}: {layer.tokens} tokens and {k.shape[2]} more exceed max_tokens "
                    f"{self.shape.max_tokens}"
                )
            layer.settle(wait=False)
            if k.shape[2]:
                layer.append(k, v, self._host.links.of((k, v)))
            return True

    def append_async(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Future[None]:
        """As :meth:`append`, in the background.

        Appends to one layer may overtake each other: wait for one before the next.

        Returns:
            A future of None.
        """
        gpu = self._host.links.of((k, v))
        return self._in_background(gpu, lambda: self.append(layer, k, v))

    def settle(self, layer: int) -> None:
        """Blocks until all tokens appended to ``layer`` are written, and their copies in memory
        given back. They survive a power cut only after :meth:`KVStore.flush`.

        Raises:
            DeviceError: A write failed: the layer is lost.
        """
        target = self._layer(layer)
        with target.lock:
            target.settle()

    # -- reading --------------------------------------------------------------------------------

    def read(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
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

        Returns:
            K and V, ``[batch, kv_heads, tokens, head_dim]`` each. They own their memory, but are
            views of the order in which tokens lie on the drive: their strides are not those of a
            new tensor.

        Raises:
            ShapeMismatch: There is no such layer or head, or the slice has another step.
            CorruptionError: A checksum differs.
            DeviceError: The drive failed, now or at an earlier append to the layer.
            ClosedError: The sequence was deleted, or the store closed.
        """
        source = self._layer(layer)
        chosen = head_list(self.shape.kv_heads, heads)
        gpu = self._gpu(device)
        if device is not None and gpu is None:
            self._host.staging.pin_for_gpu()
        self._ahead.gpu = gpu
        number = self._number(layer)
        self._host.paths.before_read(self._group, number)
        with source.lock, self._counting_corruption():
            first, last = token_range(source.tokens, tokens)
            if chosen is None:
                k, v = read_all(source, first, last, gpu)
            else:
                k, v = read_heads(source, first, last, chosen, gpu)
        self._ahead.after_read(number if tokens is None and chosen is None else None)
        # They are elsewhere if they were read ahead for another device.
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
        """As :meth:`read`, in the background.

        Returns:
            A future of K and V.
        """
        gpu = self._gpu(device)
        return self._in_background(
            gpu, lambda: self.read(layer, tokens=tokens, heads=heads, device=device)
        )

    def prefetch(
        self, layers: Iterable[int], *, first_token: int = 0, spare_tokens: int = 1
    ) -> None:
        """Starts to read layers ahead. Returns at once.

        Layers are started in the order given, behind what is read on demand: as many as half of
        the store's ``staging`` memory has room for, at least one, and the others when reads have
        taken those over. If the last :meth:`read` went to a linked GPU they go there, and take as
        much of its memory. From now on nothing is read ahead unasked.

        The next :meth:`read` of such a layer that begins at ``first_token`` takes it over. The
        memory is held until then, or until a prefetch of the layer from another token; one from
        its end reads nothing.

        Args:
            layers: Numbers of layers.
            first_token: All tokens from this one on are read.
            spare_tokens: How many tokens may be appended before the read.

        Raises:
            ShapeMismatch: There is no such layer, or a number of tokens is negative.
            ClosedError: The sequence was deleted, or the store closed.
        """
        if first_token < 0 or spare_tokens < 0:
            raise ShapeMismatch(f"tokens are counted from 0, not {min(first_token, spare_tokens)}")
        numbers = [self._usable_number(layer) for layer in layers]
        self._ahead.ask(numbers, first_token, spare_tokens)

    def _gpu(self, device: Any) -> LinkedGpu | None:
        return None if device is None else self._host.links.gpu(device)

    def _in_background(self, gpu: LinkedGpu | None, work: Callable[[], T]) -> Future[T]:
        """Runs ``work`` on another thread, in order with this one's current stream on ``gpu``."""
        stream: AbstractContextManager[Any] = nullcontext() if gpu is None else gpu.on_this_stream()

        def run() -> T:
            with stream:
                return work()

        return self._host.run_in_background(run)

    @contextmanager
    def _counting_corruption(self) -> Iterator[None]:
        try:
            yield
        except SpdkKvError as failure:
            if is_unreadable(failure):
                self._host.catalog.count_corruption()
            raise

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, tokens: int, *, layer: int | None = None) -> None:
        """Forgets all tokens from ``tokens`` on. May block on the drive.

        Args:
            tokens: How many tokens stay.
            layer: Number of the layer; all layers by default.

        Raises:
            ShapeMismatch: A layer has fewer tokens. Nothing is changed.
            DeviceError, CorruptionError: The chunk that is cut cannot be read. That layer and
                those after it are unchanged.
        """
        numbers = range(len(self._layers)) if layer is None else [self._number(layer)]
        with self._recorder.lock:
            for number in numbers:
                target = self._layer(number)
                if not 0 <= tokens <= target.tokens:
                    raise ShapeMismatch(f"{target.name} has {target.tokens} tokens, not {tokens}")
            self._recorder.mark_dirty()
            for number in numbers:
                target = self._layer(number)
                with target.lock, self._counting_corruption():
                    if tokens < target.tokens:
                        with self._recorder.forgetting(number, tokens):
                            target.truncate(tokens)
            self._recorder.commit_if_due()

    def reorder(self, rows: Iterable[int], *, layer: int | None = None) -> None:
        """Reorders the batch, as beam search does. No I/O.

        Args:
            rows: Row ``b`` of the batch becomes what row ``rows[b]`` was.
            layer: Number of the layer; all layers by default.

        Raises:
            ShapeMismatch: ``rows`` does not name one row for each row of the batch.
        """
        index = batch_order(self.shape.batch, rows)
        for number in range(len(self._layers)) if layer is None else [self._number(layer)]:
            target = self._layer(number)
            with target.lock:
                target.reorder(index)
            self._recorder.mark_dirty()

    def delete(self) -> None:
        """Deletes the sequence and gives its extents back. May be called twice.

        Blocks only for reads that are under way in other threads.
        """
        with self._recorder.lock:
            if self._recorder.deleted:
                return
            self._recorder.deleted = True
            self._ahead.clear()
            writes = []
            for layer in self._layers:
                with layer.lock:
                    writes += layer.close()
            self._host.paths.release(self._group)
            self._host.catalog.drop_sequence(self.name, self._offsets, writes)
            self._host.forget_sequence(self)

    def stage_for_commit(self) -> None:
        """For :meth:`KVStore.flush`: see :meth:`Recorder.stage`. Blocks on the drive."""
        self._recorder.stage()

    # -- arguments ------------------------------------------------------------------------------

    def _number(self, layer: int) -> int:
        number = operator.index(layer)
        if not 0 <= number < len(self._layers):
            raise ShapeMismatch(f"sequence {self.name!r} has layers 0 to {len(self._layers) - 1}")
        return number

    def _usable_number(self, layer: int) -> int:
        self._host.check_open()
        if self._recorder.deleted:
            raise ClosedError(f"sequence {self.name!r} was deleted")
        return self._number(layer)

    def _layer(self, layer: int) -> Layer:
        return self._layers[self._usable_number(layer)]
