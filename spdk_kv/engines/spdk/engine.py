"""Engine `spdk`: NVMe controllers driven from user space, over PCIe, vfio-user or TCP."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from spdk_kv._native.holding import Registered
from spdk_kv._native.transfer import DISCARD, Queue, Transfer
from spdk_kv.engines.base import Engine, QueueOptions, block_geometry
from spdk_kv.engines.failures import op_name
from spdk_kv.engines.location import Location
from spdk_kv.engines.nvme_status import is_nvme_status, nvme_error
from spdk_kv.engines.spdk import controllers, environment
from spdk_kv.errors import DeviceError, DeviceGone, DeviceTimeout, EngineUnavailable
from spdk_kv.units import format_nbytes

log = logging.getLogger(__name__)

# Commands that SPDK may split a segment into; each has a request of SPDK's, taken at opening.
_MOST_PARTS = 8192


class SpdkEngine(Engine):
    """One namespace through one queue pair, or several. Polls while something is in flight.

    Attributes beside the contract's: ``controller`` (serial, model, firmware ...) and
    ``namespace`` (block size, identity ...), as dicts.
    """

    name = "spdk"
    direct = True

    def __init__(self, location: Location, options: QueueOptions) -> None:
        super().__init__(str(location), options)
        self._location = location
        spdk = environment.bindings()
        self._dma_region = spdk.DmaRegion
        self._controller = controllers.acquire(location)
        # Further queue pairs are engines of their own that transfers are dealt out to.
        self._lanes: list[SpdkEngine] = []
        self._pairs: list[Any] = []
        self._turns = itertools.count()
        try:
            self.controller: dict[str, Any] = self._controller.describe()
            self.namespace = self._geometry(location.nsid)
            self._refuse_too_many_parts()
            self._pair = spdk.QueuePair(
                self._controller, location.nsid, options.depth, options.segment_nbytes
            )
            self._pairs.append(self._pair)
            self.block_nbytes = self.namespace["block_nbytes"]
            # PRP entries point to whole dwords (NVMe Base 2.0, section 4.1.1).
            self.align_nbytes = 4
            self._start(self._pair.backend, self._pair)
            self._refuse_if_changed(self._geometry(location.nsid))
            for _ in range(1, options.queue_pairs):
                lane = SpdkEngine(location, replace(options, queue_pairs=1))
                self._lanes.append(lane)
                self._pairs.append(lane._pair)
                self._refuse_if_changed(lane.namespace)
        except BaseException as failed:
            if self._queue is not None:
                self.close()
            else:
                self._release()
            if isinstance(failed, OSError):
                raise DeviceGone(f"{failed}; see `spdk-kv doctor`") from failed
            raise

    def _refuse_if_changed(self, now: dict[str, Any]) -> None:
        """DeviceGone where the queue pairs are not all of the namespace that was looked at."""
        if now != self.namespace:
            raise DeviceGone(f"the namespace at {self.where} was replaced while it was opened")

    def _refuse_too_many_parts(self) -> None:
        limit_nbytes = self.namespace["max_transfer_nbytes"]
        if boundary_nbytes := self.namespace["boundary_nbytes"]:
            limit_nbytes = min(limit_nbytes, boundary_nbytes)
        if self.segment_nbytes > _MOST_PARTS * limit_nbytes:
            raise EngineUnavailable(
                f"{self.where} takes {format_nbytes(limit_nbytes)} per command, and a segment of "
                f"{format_nbytes(self.segment_nbytes)} would be more than {_MOST_PARTS} of them: "
                "lower `segment`"
            )

    def _geometry(self, nsid: int) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._controller.namespace(nsid)
        except LookupError as missing:
            active = ", ".join(str(number) for number in self._controller.namespaces())
            raise EngineUnavailable(f"{missing}; active are: {active or 'none'}") from missing
        if found["metadata_nbytes"] or found["protection"]:
            raise EngineUnavailable(
                f"namespace {nsid} of {self.where} is formatted with {found['metadata_nbytes']} "
                "bytes of metadata per block; format it without (nvme format --lbaf)"
            )
        return found

    def allocate(self, nbytes: int) -> Any:
        try:
            return self._reachable(self._dma_region(nbytes))
        except MemoryError as none_left:
            if self._queue is None:
                return self._allocate_at_opening(nbytes)
            # Slower, because these bytes are copied, but the caller gets one more tensor.
            log.info("%s: ordinary memory instead", none_left)
            return super().allocate(nbytes)

    def _reachable(self, region: Any) -> Registered:
        """``region`` of SPDK, which the queue pairs reach without a copy while it lives."""
        registered = Registered(region)
        for pair in self._pairs:
            registered.add(pair.add_memory, pair.remove_memory)
        return registered

    def _allocate_at_opening(self, nbytes: int) -> Any:
        # Closed engines and caught errors may keep memory in reference cycles.
        gc.collect()
        try:
            return self._reachable(self._dma_region(nbytes))
        except MemoryError as none_left:
            raise EngineUnavailable(
                f"engine spdk: {none_left}, and it cannot do without: reserve more hugepages "
                "(`spdk-kv doctor`), or lower `depth` or `segment`"
            ) from none_left

    def transfer(self, op: int, **how: Any) -> Transfer:
        """On the queue with the fewest transfers; in turn where they are alike."""
        if not self._lanes:
            return super().transfer(op, **how)
        lanes = [self, *self._lanes]
        first = next(self._turns) % len(lanes)
        lane = min(lanes[first:] + lanes[:first], key=lambda lane: lane.queue.active)
        return Engine.transfer(lane, op, **how)

    def start(self, transfer: Transfer, *arguments: Any, **how: Any) -> Future[Any]:
        for lane in self._lanes:
            if transfer.queue is lane._queue:
                return lane.start(transfer, *arguments, **how)
        return super().start(transfer, *arguments, **how)

    @property
    def queues(self) -> list[Queue]:
        return [self.queue, *(lane.queue for lane in self._lanes)]

    @property
    def depth(self) -> int:
        """Segments kept in flight by each queue pair; may be set."""
        return int(self.queue.depth)

    @depth.setter
    def depth(self, depth: int) -> None:
        for engine in (self, *self._lanes):
            engine.queue.depth = depth

    def stats(self) -> dict[str, Any]:
        """As every engine's, added up over the queue pairs."""
        counters = super().stats()
        for lane in self._lanes:
            counters = _sum(counters, lane.stats())
        return counters

    def close(self, timeout_s: float = 30.0) -> None:
        for lane in self._lanes:
            lane.close(timeout_s)
        super().close(timeout_s)

    @property
    def capacity_nbytes(self) -> int:
        return int(self.namespace["nbytes"])

    @property
    def identity(self) -> str:
        names = (self.controller["serial"], *(self.namespace[n] for n in ("nguid", "eui64")))
        return " ".join(name for name in (*names, f"ns{self.namespace['nsid']}") if name)

    @property
    def geometry(self) -> str:
        return block_geometry(self.block_nbytes, self.capacity_nbytes)

    @property
    def gone(self) -> bool:
        """Whether the drive was removed, or does not answer just now."""
        return bool(self._controller.gone)

    def health(self) -> dict[str, Any]:
        """The drive's SMART log, main fields. Blocks, for 10 s at most. DeviceGone, DeviceTimeout,
        DeviceError."""
        try:
            return dict(self._controller.health())
        except OSError as failed:
            kind = DeviceTimeout if failed.errno == errno.ETIMEDOUT else DeviceError
            if self.gone:
                kind = DeviceGone
            raise kind(str(failed), op="health", status=failed.errno) from failed

    def error(self, transfer: Transfer) -> Exception:
        if transfer.status == errno.ENODEV and (why := self._why_not_used()):
            return DeviceGone(why, op=op_name(transfer.op), status=errno.ENODEV)
        if not is_nvme_status(transfer.status):
            return super().error(transfer)
        offset, nbytes = transfer.failure or (0, 0)
        op = op_name(transfer.op)
        return nvme_error(op, offset, nbytes, transfer.status, self.where, self.block_nbytes)

    def _why_not_used(self) -> str:
        """What became of the namespace that was opened; "" if it is still there."""
        presence = {pair.presence for pair in self._pairs}
        if "stranger" in presence:
            return (
                f"{self.where} is another namespace now than when it was opened, or was formatted "
                "anew (its identity, size or block size differ); its bytes are not touched"
            )
        if "absent" in presence:
            return f"the namespace {self.where} was removed; it is used again once it is back"
        return ""

    def discard(self, offset: int, nbytes: int, timeout_s: float | None = None) -> bool:
        if not self.controller["deallocate"]:
            return False
        transfer = self.transfer(DISCARD)
        transfer.add(offset, 0, nbytes)
        self.run(transfer, timeout_s)
        return True

    def _release(self) -> None:
        self._slots = None
        if self._pairs:
            self._pair.close()
        controllers.release(self._location)


def _sum(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> dict[Any, Any]:
    """Both, with the numbers added up by their names; what only one has is taken over."""
    both = {**one, **other}
    for name in one.keys() & other.keys():
        is_table = isinstance(one[name], Mapping)
        both[name] = _sum(one[name], other[name]) if is_table else one[name] + other[name]
    return both
