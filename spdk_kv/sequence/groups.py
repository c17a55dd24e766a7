"""Groups of tokens, wherever in a layer they lie: read in one transfer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError, DeviceError, DeviceTimeout, ShapeMismatch
from spdk_kv.paths import TrackedUnit
from spdk_kv.sequence.buffer import ReadBuffer
from spdk_kv.sequence.layer import Layer
from spdk_kv.sequence.reading import by_path
from spdk_kv.sequence.rows import as_pair
from spdk_kv.sequence.runs import Runs

if TYPE_CHECKING:
    import torch

Guard = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Part:
    """What is on its way by one path. ``crcs``: of all its chunks, as they should be. The epochs
    are those of ``unit``, the layer's if that is on the page-cache path, at the time of the
    request."""

    transfer: Transfer
    engine: Engine
    unit: TrackedUnit | None
    warm_epoch: int
    copy_epoch: int
    crcs: bytes


class GroupReading:
    """Groups of a layer on their way into memory; :meth:`Sequence.start_groups` begins one.

    Not thread-safe. Dropped before it is finished, it keeps its memory until the drive is done
    with it.

    Attributes:
        nbytes: Bytes that are asked of the drive: whole chunks, those that groups share once.
    """

    def __init__(
        self,
        layer: Layer,
        groups: np.ndarray[Any, np.dtype[np.int64]],
        group_tokens: int,
        guard: Guard,
    ) -> None:
        """The caller holds the layer's lock."""
        self._layer = layer
        self._guards = [guard]
        self._shape = len(groups), group_tokens
        contents, layout = layer.contents, layer.contents.layout
        self._born = contents.shrinks, layer.order.changes
        rows = layer.order.stored_rows(groups, group_tokens)
        # What is copied in one piece of where it was read: a group, or a token of it.
        each = rows.shape[1]
        self._piece_nbytes = group_tokens * layout.row_nbytes // each
        start = groups[:, 1:] * (group_tokens * layout.row_nbytes)
        starts = start + np.arange(each) * self._piece_nbytes
        self._runs = Runs.covering(
            rows.ravel(), starts.ravel(), self._piece_nbytes, layout.chunk_nbytes
        )
        self._places = self._runs.places(rows.ravel(), starts.ravel())
        self._buffer = layer.reader.buffer(self._runs.nbytes)
        self._parts: list[_Part] = []
        self._over = False
        end = layer.reader.on_drive_nbytes
        for unit, _ in by_path(contents.units, contents.extents):
            if unit is None:
                self._request(None, layer.paths.routes.direct, 0, end)
            else:
                layer.paths.routes.route(unit, 0, end, self._requester(unit))
        self.nbytes = sum(part.transfer.nbytes for part in self._parts)
        self._take_from_memory(self._buffer, end)

    def _requester(self, unit: TrackedUnit) -> Callable[[Engine, int, int], None]:
        return lambda engine, start, end: self._request(unit, engine, start, end)

    def _request(self, unit: TrackedUnit | None, engine: Engine, start: int, end: int) -> None:
        """Starts to read what lies in bytes ``[start, end)`` of the extents."""
        contents = self._layer.contents
        numbers, starts, ends, at = self._runs.within(start, end)
        if not len(numbers):
            return
        offsets, addresses, sizes = contents.pieces(
            numbers, starts, ends, at + self._buffer.address
        )
        transfer = self._buffer.transfer(
            engine,
            int(sizes.sum()),
            checksum=self._layer.verify,
            chunk_nbytes=contents.layout.chunk_nbytes,
        )
        transfer.add_many(offsets, addresses, sizes)
        epochs = (unit.warm_epoch, unit.copy_epoch) if unit else (0, 0)
        crcs = contents.crcs_of(numbers, starts, ends) if self._layer.verify else b""
        transfer.submit(None, 0)
        self._parts.append(_Part(transfer, engine, unit, *epochs, crcs))

    def _take_from_memory(self, buffer: ReadBuffer, start: int) -> None:
        """Copies what lies behind byte ``start`` of the extents: the drive has yet to write it."""
        numbers, starts, ends, at = self._runs.within(start, self._layer.contents.end_nbytes)
        if not len(numbers):
            return
        memory = buffer.as_bytes(1, self._runs.nbytes)[0]
        for number, first, last, place in zip(numbers, starts, ends, at, strict=True):
            extents = range(number, number + 1)
            for begin, part in self._layer.reader.in_memory(extents, int(first), int(last)):
                into = int(place) + begin - int(first)
                memory[into : into + part.shape[1]] = part[0]

    def guarded(self, guard: Guard) -> GroupReading:
        """Itself; :meth:`finish` runs within ``guard()`` as well."""
        self._guards.append(guard)
        return self

    def cancel(self) -> None:
        """Stops reading. Does not block; :meth:`finish` is not to be called any more."""
        self._over = True
        for part in self._parts:
            if part.transfer.in_flight:
                part.transfer.cancel()

    def finish(self, *, timeout_s: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Waits for the drive, checks what came, and hands it over, once.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes. After a timeout it
                may be called again.

        Returns:
            K and V in host memory, ``[groups, group_tokens, kv_heads, head_dim]`` each, views of
            one memory that they own.

        Raises:
            ShapeMismatch: The layer was truncated or reordered since it began.
            CorruptionError: A checksum differs.
            DeviceTimeout: It was not over within ``timeout_s``.
            DeviceError: The drive failed.
            ClosedError: The sequence was deleted since, or the store closed.
            ValueError: It was handed over before, or cancelled.
        """
        if self._over:
            raise ValueError("a reading of groups is handed over once")
        deadline = Deadline(timeout_s)
        with ExitStack() as guards:
            for guard in self._guards:
                guards.enter_context(guard())
            buffer = self._buffer if self._arrived(deadline) else self._again(deadline)
            self._check()
        self._over = True
        rows = self._joined(buffer)
        count, tokens = self._shape
        layout = replace(self._layer.contents.layout, batch=max(1, count))
        if not count:  # torch views no empty bytes as [0, tokens, ...]
            rows = rows.new_empty(tokens * layout.row_nbytes)
        k, v = as_pair(layout, rows.view(layout.batch, -1))
        return k.transpose(1, 2)[:count], v.transpose(1, 2)[:count]

    def _check(self) -> None:
        contents = self._layer.contents
        contents.check()
        if self._born != (contents.shrinks, self._layer.order.changes):
            raise ShapeMismatch(
                f"{contents.name} was truncated or reordered while groups of it were read"
            )

    def _arrived(self, deadline: Deadline) -> bool:
        """Waits. Whether everything is there, and right."""
        paths = self._layer.paths
        for part in self._parts:
            transfer, unit = part.transfer, part.unit
            try:
                part.engine.wait(transfer, deadline)
            except DeviceTimeout:
                raise
            except (DeviceError, CorruptionError):
                return False
            cached = unit if part.engine is not paths.routes.direct else None
            if cached is not None and cached.copy_epoch != part.copy_epoch:
                if paths.routes.copy is not None:
                    paths.routes.copy.sweep(cached)
                return False  # what was found there may be another unit's by now
            if self._layer.verify and transfer.all_chunk_crcs() != part.crcs:
                return False
            group = self._layer.contents.units[0].group
            paths.record_read(group, cached, transfer.nbytes, transfer.cold_nbytes, part.warm_epoch)
        return True

    def _again(self, deadline: Deadline) -> ReadBuffer:
        """Reads everything once more, run by run, as whole layers are read: what one path cannot
        deliver, the other one may. Raises what is wrong."""
        layer, runs = self._layer, self._runs
        buffer = layer.reader.buffer(runs.nbytes)  # the drive may still write into the first one
        with deadline.hold(layer.lock):
            self._check()
            end = layer.reader.on_drive_nbytes
            memory = buffer.as_bytes(1, runs.nbytes)[0]
            for number, first, last, at in zip(*runs.within(0, end), strict=True):
                found = layer.reader.read_range(int(number), int(first), int(last), deadline)
                memory[int(at) : int(at) + len(found)] = found
            self._take_from_memory(buffer, end)
        return buffer

    def _joined(self, buffer: ReadBuffer) -> torch.Tensor:
        """The bytes of all groups in the order asked for, one behind the other."""
        piece, places = self._piece_nbytes, self._places
        memory = buffer.as_bytes(1, self._runs.nbytes)[0]
        if np.array_equal(places, np.arange(len(places)) * piece):
            return memory[: len(places) * piece]
        import torch

        # Pieces begin at multiples of this, in the buffer as well.
        unit = math.gcd(piece, self._layer.contents.layout.chunk_nbytes)
        index = places[:, None] // unit + np.arange(piece // unit)
        units = memory.numpy()[: self._runs.nbytes].reshape(-1, unit)
        return torch.from_numpy(units.take(index.ravel(), 0).reshape(-1))


def start_groups(
    layer: Layer,
    groups: np.ndarray[Any, np.dtype[np.int64]],
    group_tokens: int,
    guard: Guard,
    deadline: Deadline = NEVER,
) -> GroupReading:
    """Starts to read ``groups``, all of them whole. Waits for other calls on the layer."""
    with deadline.hold(layer.lock):
        layer.settle(wait=False)
        _check_groups(layer, groups, group_tokens)
        return GroupReading(layer, groups, group_tokens, guard)


def _check_groups(layer: Layer, groups: np.ndarray[Any, Any], group_tokens: int) -> None:
    layout = layer.contents.layout
    if layout.order != "token":
        raise ShapeMismatch(
            f"{layer.name}: groups are read of sequences with granularity 'token', not "
            f"{layout.order!r}"
        )
    if not len(groups):
        return
    (row, first), (last_row, last) = groups.min(0), groups.max(0)
    if row < 0 or last_row >= layout.batch:
        raise ShapeMismatch(f"{layer.name} has batch rows 0 to {layout.batch - 1}")
    if first < 0 or (last + 1) * group_tokens > layer.tokens:
        raise ShapeMismatch(
            f"{layer.name} has {layer.tokens // group_tokens} whole groups of {group_tokens} "
            f"tokens, not {last if first >= 0 else first}"
        )
