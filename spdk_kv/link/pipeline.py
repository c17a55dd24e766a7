"""Links to GPUs, and transfers over them: chunk size and depth from what earlier ones took."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spdk_kv._native.link.cuda import CudaLink
from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.engines import Engine, Link
from spdk_kv.link.planner import Cut, Limits, Planner
from spdk_kv.units import GIB, MIB

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MODES = ("fixed", "adaptive")
# Numbers for transfers' plans, told apart by all that share an engine.
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Plan:
    """How a transfer is cut. ``depth``: chunks at once, those on the link included. ``number``: by
    which its outcome is known; 0: nobody learns from it."""

    chunk_nbytes: int
    depth: int
    reason: str
    number: int = 0


class Pipeline:
    """Transfers between an engine and a GPU, cut so that the drive and the link overlap.

    ``mode``: ``adaptive`` picks chunk size and depth from what transfers took, apart for each size
    of them, with checksums or without, and for those that begin while others are under way (they
    overlap with those, too); ``fixed`` takes ``chunk_nbytes`` and ``depth`` (None: the engine's
    segments, all of its slots). Thread-safe. Raises ValueError, EngineUnavailable.
    """

    def __init__(
        self,
        engine: Engine,
        link: Link,
        mode: str = "adaptive",
        *,
        chunk_nbytes: int | None = None,
        depth: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        if mode == "adaptive" and (chunk_nbytes is not None or depth is not None):
            raise ValueError("chunk_nbytes and depth are for the mode 'fixed'")
        engine.use_link(link)
        self.engine = engine
        self.link = link
        self.mode = mode
        self._slots = engine.queue.slots
        self._fixed = Plan(chunk_nbytes or engine.segment_nbytes, depth or self._slots, "as given")
        self._lock = threading.Lock()
        self._planners: dict[tuple[int, int, int, bool, bool], Planner] = {}
        self._numbered: dict[tuple[Planner, Cut], int] = {}
        self._planned: dict[int, tuple[Planner, Cut]] = {}
        # Of each queue's outcomes, how many were listened to. Not the queues: they hold memory.
        self._heard = [queue.outcomes(0)[0] for queue in engine.queues]
        self._before = engine.stats()
        self._last: dict[int, Plan | tuple[Planner, Cut]] = {}
        self._begun = {False: 0, True: 0}

    def transfer(self, op: int, nbytes: int, *, chunk_nbytes: int = 0, **options: Any) -> Transfer:
        """An empty transfer for about ``nbytes``; see :meth:`Engine.transfer` for the rest.

        ``chunk_nbytes``: of its checksums; it must divide the engine's segments.
        """
        plan = self.plan(op, nbytes, chunk_nbytes, options.get("checksum", False))
        return self.engine.transfer(
            op,
            link=self.link,
            segment_nbytes=plan.chunk_nbytes,
            window=plan.depth,
            plan=plan.number,
            chunk_nbytes=chunk_nbytes,
            **options,
        )

    def plan(self, op: int, nbytes: int, multiple_nbytes: int = 0, checksum: bool = False) -> Plan:
        """The plan for the next transfer of ``nbytes`` (READ or WRITE), to be begun now."""
        queued = any(queue.active for queue in self.engine.queues)
        if self.mode == "fixed":
            with self._lock:
                self._last[op] = self._fixed
                self._begun[queued] += 1
            return self._fixed
        key = (op, nbytes.bit_length(), multiple_nbytes, checksum, queued)
        with self._lock:
            self._begun[queued] += 1
            self._listen()
            planner = self._planners.get(key)
            if planner is None:
                multiple = multiple_nbytes or self.engine.block_nbytes
                limits = Limits(self.engine.segment_nbytes, multiple, self._slots, queued)
                planner = self._planners[key] = Planner(nbytes, limits)
            cut = planner.next()
            number = self._numbered.get((planner, cut))
            if number is None:
                number = self._numbered[planner, cut] = next(_numbers)
                self._planned[number] = (planner, cut)
            self._last[op] = (planner, cut)
        return Plan(cut.chunk_nbytes, cut.depth, "adaptive", number)

    def _listen(self) -> None:
        """Tells the planners what became of their transfers."""
        for at, queue in enumerate(self.engine.queues):
            self._heard[at], outcomes = queue.outcomes(self._heard[at])
            for number, nbytes, took_ns in outcomes:
                if planned := self._planned.get(number):
                    planner, cut = planned
                    planner.saw(cut, nbytes, took_ns / 1e9)

    def stats(self) -> dict[str, Any]:
        """What was chosen for the last transfer (``read`` and ``write``: ``chunk_nbytes``,
        ``depth``, ``reason``, ``reached_gib_s`` where it is known), and what the engine reached
        since this pipeline was made: ``drive_gib_s`` and ``link_gib_s`` while each was busy;
        ``overlap``, the part of the shorter of those times in which both were; ``queued``, the
        part of this pipeline's transfers that began while others were under way."""
        now = self.engine.stats()
        since = {
            name: now[name] - self._before[name]
            for name in (
                "read_nbytes",
                "written_nbytes",
                "busy_ns",
                "to_device_nbytes",
                "from_device_nbytes",
                "copy_busy_ns",
                "overlap_ns",
            )
        }
        drive = since["read_nbytes"] + since["written_nbytes"]
        link = since["to_device_nbytes"] + since["from_device_nbytes"]
        shorter = min(since["busy_ns"], since["copy_busy_ns"])
        found: dict[str, Any] = {
            "mode": self.mode,
            "link": self.link.name,
            "drive_gib_s": drive / GIB / max(since["busy_ns"], 1) * 1e9,
            "link_gib_s": link / GIB / max(since["copy_busy_ns"], 1) * 1e9,
            "overlap": since["overlap_ns"] / shorter if shorter else 0.0,
            "queued": self._begun[True] / max(1, sum(self._begun.values())),
        }
        with self._lock:
            if self.mode == "adaptive":
                self._listen()
            for op, name in ((READ, "read"), (WRITE, "write")):
                if op in self._last:
                    found[name] = _described(self._last[op])
        return found


def _described(last: Plan | tuple[Planner, Cut]) -> dict[str, Any]:
    if isinstance(last, Plan):
        return {"chunk_nbytes": last.chunk_nbytes, "depth": last.depth, "reason": last.reason}
    planner, cut = last
    found = {"chunk_nbytes": cut.chunk_nbytes, "depth": cut.depth, "reason": planner.why()}
    if planner.bytes_per_s:
        found["reached_gib_s"] = planner.bytes_per_s / GIB
    return found


_links: dict[tuple[int, int], CudaLink] = {}
_links_lock = threading.Lock()


def link_for(device: torch.device | str | int) -> tuple[CudaLink | None, str]:
    """The link to a torch device, or None, and why there is none.

    Made once per GPU and process; the first time takes some tens of milliseconds.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None, f"{device} is no CUDA device"
    if torch.version.cuda is None:
        return None, "this build of torch is without CUDA"
    if not torch.cuda.is_available():
        return None, "torch finds no usable GPU"
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    with _links_lock:
        key = (os.getpid(), ordinal)
        if key not in _links:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            try:
                _links[key] = measured(CudaLink(ordinal))
            except OSError as refused:
                return None, str(refused)
        return _links[key], ""


def measured(link: CudaLink) -> CudaLink:
    """``link``, once its speed is known; without it copies are looked at more often than needed."""
    memory = Region(4 * MIB)
    try:
        held = link.register(memory)  # until this returns
        link.measure(memory)
    except OSError as refused:
        log.info("the speed of the link to GPU %d is not known: %s", link.ordinal, refused)
    else:
        del held
        log.info(
            "GPU %d, %s: %.1f GiB/s to it, %.1f GiB/s from it in copies of 1 MiB",
            link.ordinal,
            link.device_name,
            MIB / GIB / max(link.copy_time_s(MIB), 1e-9),
            MIB / GIB / max(link.copy_time_s(MIB, False), 1e-9),
        )
    return link


def stream_of(device: torch.device | str | int) -> int:
    """The handle of torch's current stream on ``device``, for a transfer's ``stream``."""
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)
