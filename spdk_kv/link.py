"""Links to GPUs, and how a transfer over one is cut: chunk size and depth from what is measured."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spdk_kv._native.cuda_link import CudaLink
from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.engines.base import Engine, Link
from spdk_kv.units import GIB, KIB, MIB, format_nbytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MODES = ("fixed", "adaptive")
_SMALLEST_CHUNK = 64 * KIB
# Chunks that a rate is believed from, and what is hoped for where there are fewer.
_ENOUGH_CHUNKS = 16
_HOPE = 1.1
# Of a size's bytes, what a depth has to have moved to be believed.
_STEADY_PART = 0.25
# A smaller chunk costs more CPU time: it has to be faster by this much. Likewise, a deeper queue.
_WORTH = 0.02
# Besides those at the drive: one on the link, one behind it, two being summed.
_BESIDE_THE_DRIVE = 4
# Transfers of about one size until their plan is made anew: this many at most, or so many bytes.
_PLAN_LASTS = 16
_PLAN_LASTS_NBYTES = 256 * MIB
# What was seen of a size counts as so many chunks at most, and less with every plan: what other
# work made look slow for a while is tried again.
_MOST_CHUNKS = 256
_KEPT = 0.99


@dataclass(frozen=True)
class Rate:
    """What a drive did with commands of about one size at about one depth. ``bursts``: how often
    some of them were over at once; one by one, that is as often as there were commands."""

    segment_nbytes: int
    depth: int
    nbytes: float
    busy_ns: float
    bursts: float

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / max(self.busy_ns, 1.0) * 1e9

    @property
    def at_once(self) -> float:
        """Commands over at once, on average."""
        return max(1.0, self.nbytes / self.segment_nbytes / max(self.bursts, 1.0))


@dataclass(frozen=True)
class Limits:
    """``segment_nbytes``: the largest chunk. ``multiple_nbytes``: every chunk is a multiple of it.
    ``slots``: chunks that have room at once."""

    segment_nbytes: int
    multiple_nbytes: int
    slots: int


@dataclass(frozen=True)
class Plan:
    """How a transfer is cut. ``depth``: chunks at once, those on the link included."""

    chunk_nbytes: int
    depth: int
    reason: str


def choose(
    nbytes: int, rates: Iterable[Rate], latency_s: float, s_per_byte: float, limits: Limits
) -> Plan:
    """The plan for a transfer of ``nbytes`` that should take the least time.

    ``rates``: what the drive was seen to do. ``latency_s`` and ``s_per_byte``: what a copy over
    the link takes. Pure: the same numbers, the same plan.
    """
    seen = _steady(rates)
    chunks = _chunks(limits)
    if not seen:
        # Eight or more, so that the drive and the link overlap, and not too small for a drive.
        wanted = [chunk for chunk in chunks if chunk <= max(nbytes // 8, 256 * KIB)]
        chunk = max(wanted, default=chunks[0])
        return Plan(chunk, limits.slots, "nothing is measured yet")
    fastest = max(seen, key=lambda rate: rate.bytes_per_s)
    best: tuple[float, Rate, bool] | None = None
    for chunk in sorted(chunks, reverse=True):
        drive = _drive(chunk, seen)
        known = drive is not None
        if drive is None:
            speed = _HOPE * fastest.bytes_per_s
            drive = Rate(chunk, limits.slots, speed, 1e9, speed / chunk)
        took = _time(nbytes, chunk, drive, latency_s, s_per_byte)
        if best is None or took < best[0] * (1 - _WORTH):
            best = (took, replace(drive, segment_nbytes=chunk), known)
    assert best is not None
    _, drive, known = best
    chunk = drive.segment_nbytes
    link = (
        f"{chunk / (latency_s + chunk * s_per_byte) / GIB:.2f} GiB/s" if s_per_byte else "unknown"
    )
    return Plan(
        chunk,
        # What was seen at a depth is up to the next power of two.
        min(limits.slots, 2 * drive.depth + _BESIDE_THE_DRIVE),
        f"chunks of {format_nbytes(chunk)}: drive {drive.bytes_per_s / GIB:.2f} GiB/s "
        f"({'measured' if known else 'to be tried'}), link {link}",
    )


def _chunks(limits: Limits) -> list[int]:
    """Chunk sizes to choose from: the largest, and its halves as long as they keep to limits."""
    chunks = []
    chunk = limits.segment_nbytes
    while chunk >= min(_SMALLEST_CHUNK, limits.segment_nbytes):
        if chunk % limits.multiple_nbytes == 0:
            chunks.append(chunk)
        if chunk % 2:
            break
        chunk //= 2
    if not chunks:
        raise ValueError(
            f"segments of {limits.segment_nbytes} bytes are no multiple of {limits.multiple_nbytes}"
        )
    return chunks


def _steady(rates: Iterable[Rate]) -> list[Rate]:
    """Those that can be believed: of enough chunks, at a depth that held for a good part of them.
    What came while a queue filled or drained says nothing about the depth it came at."""
    rates = list(rates)
    total: dict[int, float] = {}
    for rate in rates:
        total[rate.segment_nbytes] = total.get(rate.segment_nbytes, 0.0) + rate.nbytes
    return [
        rate
        for rate in rates
        if rate.nbytes >= _ENOUGH_CHUNKS * rate.segment_nbytes
        and rate.nbytes >= _STEADY_PART * total[rate.segment_nbytes]
    ]


def _drive(chunk: int, seen: list[Rate]) -> Rate | None:
    """What was seen of chunks of this size, at the least depth that gives their best speed."""
    alike = [rate for rate in seen if rate.segment_nbytes == 1 << (chunk.bit_length() - 1)]
    if not alike:
        return None
    speed = max(rate.bytes_per_s for rate in alike)
    enough = [rate for rate in alike if rate.bytes_per_s >= (1 - _WORTH) * speed]
    return min(enough, key=lambda rate: rate.depth)


def _time(nbytes: int, chunk: int, drive: Rate, latency_s: float, s_per_byte: float) -> float:
    """Seconds until the last of ``nbytes`` is over the link."""
    count = -(-nbytes // chunk)
    on_drive = chunk / max(drive.bytes_per_s, 1.0)
    on_link = latency_s + min(chunk, nbytes) * s_per_byte
    # What the drive ends with comes at once, and goes over the link one by one.
    drive_bound = nbytes / max(drive.bytes_per_s, 1.0) + min(count, drive.at_once) * on_link
    # Or the link never rests after the first ones.
    link_bound = min(drive.at_once, count) * on_drive + count * on_link
    return max(drive_bound, link_bound)


class Pipeline:
    """Transfers between an engine and a GPU, cut so that the drive and the link overlap.

    ``mode``: ``adaptive`` picks chunk size and depth from what was measured, for each size of
    transfer; ``fixed`` takes ``chunk_nbytes`` and ``depth`` (None: the engine's segments, all of
    its slots). Thread-safe. Raises ValueError, EngineUnavailable.
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
        slots = engine.queue.slots
        self._fixed = Plan(chunk_nbytes or engine.segment_nbytes, depth or slots, "as given")
        self._slots = slots
        self._lock = threading.Lock()
        self._plans: dict[tuple[int, int, int], tuple[Plan, int]] = {}
        self._counted: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self._rates: dict[tuple[int, int, int], Rate] = {}
        self._before = engine.stats()
        self._last: dict[int, Plan] = {}

    def transfer(self, op: int, nbytes: int, *, chunk_nbytes: int = 0, **options: Any) -> Transfer:
        """An empty transfer for about ``nbytes``; see :meth:`Engine.transfer` for the rest.

        ``chunk_nbytes``: of its checksums; it must divide the engine's segments.
        """
        plan = self.plan(op, nbytes, chunk_nbytes)
        return self.engine.transfer(
            op,
            link=self.link,
            segment_nbytes=plan.chunk_nbytes,
            window=plan.depth,
            chunk_nbytes=chunk_nbytes,
            **options,
        )

    def plan(self, op: int, nbytes: int, multiple_nbytes: int = 0) -> Plan:
        """The plan for the next transfer of ``nbytes`` (READ or WRITE)."""
        if self.mode == "fixed":
            self._last[op] = self._fixed
            return self._fixed
        key = (op, nbytes.bit_length(), multiple_nbytes)
        with self._lock:
            plan, lasts = self._plans.get(key, (None, 0))
            if plan is None or not lasts:
                plan = self._choose(op, nbytes, multiple_nbytes)
                lasts = max(2, min(_PLAN_LASTS, _PLAN_LASTS_NBYTES // max(nbytes, 1)))
            self._plans[key] = (plan, lasts - 1)
            self._last[op] = plan
        return plan

    def _choose(self, op: int, nbytes: int, multiple_nbytes: int) -> Plan:
        self._learn(op)
        multiple = multiple_nbytes or self.engine.block_nbytes
        to_device = op == READ
        latency_s = self.link.copy_time_s(0, to_device)
        return choose(
            nbytes,
            [rate for key, rate in self._rates.items() if key[0] == op],
            latency_s,
            (self.link.copy_time_s(MIB, to_device) - latency_s) / MIB,
            Limits(self.engine.segment_nbytes, multiple, self._slots),
        )

    def _learn(self, op: int) -> None:
        """Adds what the drive did since; what is older counts less and less."""
        sizes: dict[int, list[Rate]] = {}
        for segment_nbytes, depth, *now in self.engine.queue.rates(op):
            key = (op, segment_nbytes, depth)
            before = self._counted.get(key, (0, 0, 0))
            self._counted[key] = (now[0], now[1], now[2])
            known = self._rates.get(key, Rate(segment_nbytes, depth, 0, 0, 0))
            added = Rate(
                segment_nbytes,
                depth,
                known.nbytes + now[0] - before[0],
                known.busy_ns + now[1] - before[1],
                known.bursts + now[2] - before[2],
            )
            sizes.setdefault(segment_nbytes, []).append(added)
        for segment_nbytes, rates in sizes.items():
            # All depths alike, so that it stays known which of them held.
            total = sum(rate.nbytes for rate in rates)
            kept = _KEPT * min(1.0, _MOST_CHUNKS * segment_nbytes / total)
            for rate in rates:
                self._rates[op, segment_nbytes, rate.depth] = replace(
                    rate,
                    nbytes=rate.nbytes * kept,
                    busy_ns=rate.busy_ns * kept,
                    bursts=rate.bursts * kept,
                )

    def stats(self) -> dict[str, Any]:
        """What was chosen last (``read`` and ``write``: ``chunk_nbytes``, ``depth``, ``reason``),
        and what the engine reached since this pipeline was made: ``drive_gib_s`` and
        ``link_gib_s`` while each was busy, and ``overlap``, the part of the shorter of those times
        in which both were."""
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
        }
        for op, name in ((READ, "read"), (WRITE, "write")):
            if plan := self._last.get(op):
                found[name] = {
                    "chunk_nbytes": plan.chunk_nbytes,
                    "depth": plan.depth,
                    "reason": plan.reason,
                }
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
