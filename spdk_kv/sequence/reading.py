"""One reading of a layer's tokens: the commands under way, their check, the batch's order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from spdk_kv._native.transfer import READ, Transfer
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError, DeviceError, DeviceTimeout, SpdkKvError
from spdk_kv.link import GpuMemory, LinkedGpu
from spdk_kv.paths import Orchestrator, TrackedUnit
from spdk_kv.placement import StagingPool
from spdk_kv.tensors import tensor_from

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CRC_NBYTES = 4
"""Of a chunk's checksum, as the index keeps it."""


class Room:
    """Memory that a reading goes to: leased from ``staging``, or torch's on a linked ``device``."""

    def __init__(self, staging: StagingPool, nbytes: int, device: LinkedGpu | None) -> None:
        self.device = device
        self.nbytes = nbytes
        self._memory: Any = device.allocate(nbytes) if device else staging.lease(max(1, nbytes))
        self.address: int = self._memory.address

    def transfer(self, engine: Engine, nbytes: int, **options: Any) -> Transfer:
        """An empty read of ``nbytes`` in all into this memory, which it keeps."""
        if self.device is None:
            transfer = engine.transfer(READ, **options)
            transfer.keep(self._memory)
        else:
            memory: GpuMemory = self._memory
            transfer = self.device.transfer(engine, READ, nbytes, memory.stream, **options)
            transfer.keep(memory.tensor)
        return transfer

    def lines(self, count: int, stride: int) -> torch.Tensor:
        """The memory as bytes, ``[count, stride]``, for torch's current stream."""
        if self.device is None:
            return tensor_from(self._memory, "uint8", (count, stride))
        self._memory.join()
        tensor: torch.Tensor = self._memory.tensor
        return tensor[: count * stride].view(count, stride)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU, or on a GPU, for a copy to this memory that nobody waits for."""
        if self.device is None or tensor.is_cuda:
            return tensor
        return self.device.upload(tensor)


@dataclass
class Part:
    """Bytes ``[start, end)`` of some of a reading's extents, on their way by one path.

    ``unit``: whose they are, if it is on the page-cache path; ``looks`` and ``life``: its own, when
    they were asked for. ``lines``: which lines of the room they go to.
    """

    transfer: Transfer
    engine: Engine
    unit: TrackedUnit | None
    looks: int
    life: int
    lines: range
    start: int
    end: int


@dataclass
class Reading:
    """Tokens ``[first, ...)`` of some extents of a layer on their way into one room.

    ``start``: byte of the extents at which the room begins; ``stride``: bytes of the room per
    extent; ``until``: byte up to which the parts asked for so far cover them; ``chunk_nbytes``:
    bytes that share a checksum.
    """

    extents: range
    first: int
    start: int
    stride: int
    until: int
    chunk_nbytes: int
    room: Room
    offsets: Sequence[int]
    verify: bool
    parts: list[Part] = field(default_factory=list)

    def ask(
        self,
        engine: Engine,
        unit: TrackedUnit | None,
        lines: range,
        start: int,
        end: int,
        priority: int,
    ) -> Part:
        """Starts to read bytes ``[start, end)`` of the extents of ``lines``."""
        looks, life = (unit.looks, unit.life) if unit else (0, 0)
        transfer = self.room.transfer(
            engine,
            len(lines) * (end - start),
            checksum=self.verify,
            chunk_nbytes=self.chunk_nbytes,
        )
        for line in lines:
            address = self.room.address + line * self.stride + start - self.start
            transfer.add(self.offsets[self.extents[line]] + start, address, end - start)
        transfer.submit(None, priority)
        return Part(transfer, engine, unit, looks, life, lines, start, end)

    def begin(
        self,
        unit: TrackedUnit | None,
        lines: range,
        priority: int,
        engine: Engine,
        start: int,
        end: int,
    ) -> None:
        """As :meth:`ask`; :meth:`complete` waits for it."""
        self.parts.append(self.ask(engine, unit, lines, start, end, priority))

    def complete(self, paths: Orchestrator, crcs: Sequence[bytearray]) -> None:
        """Waits until all is there. ``crcs``: per extent of the layer, the checksums of its chunks;
        CorruptionError where one differs. What one path cannot deliver the other one may."""
        for part in self.parts:
            self._receive(part, paths, crcs)

    @property
    def passes_the_cache(self) -> bool:
        """Whether some of it is on its way directly."""
        return any(part.unit is None and part.transfer.in_flight for part in self.parts)

    def cancel(self) -> None:
        """Stops reading; the memory is kept until the device has let go of it."""
        for part in self.parts:
            if part.transfer.in_flight:
                part.transfer.cancel()

    def _receive(self, part: Part, paths: Orchestrator, crcs: Sequence[bytearray]) -> None:
        through_cache = part.engine is not paths.direct
        failure: SpdkKvError | None = None
        try:
            self._complete(part, crcs)
        except DeviceTimeout:
            raise  # the device may still write into the room
        except (DeviceError, CorruptionError) as failed:
            failure = failed
        unit = part.unit
        if through_cache and unit is not None and unit.life != part.life:
            # Forgotten meanwhile: whatever was found there may not be the unit's any more.
            if failure is not None and part.transfer.in_flight:
                raise failure
            part = self.ask(paths.direct, None, part.lines, part.start, part.end, 0)
            self._complete(part, crcs)
            if paths.copy is not None:
                paths.copy.sweep(unit)
            through_cache, unit = False, None
        elif failure is not None:
            self._take_over(part, paths, crcs, failure)
        elif unit is not None and not through_cache:
            lines = partial(self._lines, part)
            paths.was_delivered(unit, part.start, lines, self.chunk_nbytes)
        transfer = part.transfer
        cached = unit if through_cache else None
        paths.was_read(cached, transfer.nbytes, transfer.cold_nbytes, part.looks)

    def _lines(self, part: Part) -> torch.Tensor:
        """The bytes of a part that is there, ``[extents, bytes]``."""
        lines = self.room.lines(len(self.extents), self.stride)[part.lines.start : part.lines.stop]
        return lines[:, part.start - self.start : part.end - self.start]

    def _complete(self, part: Part, crcs: Sequence[bytearray]) -> None:
        part.engine.wait(part.transfer)
        if not self.verify:
            return
        wanted = slice(
            part.start // self.chunk_nbytes * CRC_NBYTES, part.end // self.chunk_nbytes * CRC_NBYTES
        )
        for piece, line in enumerate(part.lines):
            number = self.extents[line]
            if part.transfer.chunk_crcs(piece) != crcs[number][wanted]:
                raise CorruptionError(
                    f"stored bytes between {part.start} and {part.end} of extent {number} are not "
                    "those that were appended (CRC32C differs)"
                )

    def _take_over(
        self, part: Part, paths: Orchestrator, crcs: Sequence[bytearray], failure: SpdkKvError
    ) -> None:
        """Reads by the other path; raises ``failure`` where that cannot either."""
        engine = paths.other(part.engine, part.unit, part.end)
        # Without checksums nobody could tell whether the other path's bytes are the right ones.
        if engine is None or not self.verify:
            raise failure
        # Over a link what is begun later lands later, and after a failure nothing is begun.
        if part.transfer.in_flight and self.room.device is None:
            raise failure
        try:
            again = self.ask(engine, None, part.lines, part.start, part.end, 0)
            self._complete(again, crcs)
        except SpdkKvError:
            raise failure from None
        log.warning("%s; the engine %s delivered it", failure, engine.name)
        lost = part.unit if engine is paths.direct else None
        paths.took_over(lost, part.transfer.nbytes, failure)


def by_path(units: Sequence[TrackedUnit], extents: range) -> list[tuple[TrackedUnit | None, range]]:
    """The lines of a reading of ``extents`` of a layer, whose ``units`` are K and V: those of each
    unit that goes through the page cache, and (None) those that go directly."""
    every = range(len(extents))
    if not any(unit.cached for unit in units):
        return [(None, every)]
    border = len(units[0].extents)
    lines = sum(number < border for number in extents)
    halves = zip(units, (every[:lines], every[lines:]), strict=True)
    return [(unit if unit.cached else None, half) for unit, half in halves if half]
