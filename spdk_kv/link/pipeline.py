"""Transfers over a link: segment size and depth, chosen from what earlier transfers took."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any

from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.engines import Engine, Link
from spdk_kv.link.planner import Cut, Limits, Planner
from spdk_kv.units import GIB

MODES = ("fixed", "adaptive")
# Numbers of plans. One count for all pipelines, since several may share an engine's outcomes.
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Plan:
    """How a transfer is cut. ``depth``: segments at once, those on the link included. ``number``
    identifies its outcome; 0: nothing is learnt from it."""

    segment_nbytes: int
    depth: int
    reason: str
    number: int = 0


class Pipeline:
    """Transfers between an engine and a GPU, cut so that the drive and the link overlap.

    Thread-safe.

    Args:
        engine: The engine; it must support ``link``.
        link: The way to the GPU.
        mode: ``adaptive`` learns segment size and depth from what transfers took, separately for
            each size of transfer, for those with checksums, and for those that begin while others
            are under way and overlap with them. ``fixed`` uses the two arguments below.
        segment_nbytes: Bytes per segment; the engine's largest by default.
        depth: Segments at once, those on the link included; as many as the engine has slots by
            default.

    Raises:
        ValueError: There is no such mode, or it takes no segment size or depth.
        EngineUnavailable: The engine cannot use the link.
    """

    def __init__(
        self,
        engine: Engine,
        link: Link,
        mode: str = "adaptive",
        *,
        segment_nbytes: int | None = None,
        depth: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
        if mode == "adaptive" and (segment_nbytes is not None or depth is not None):
            raise ValueError("segment_nbytes and depth are for the mode 'fixed'")
        engine.use_link(link)
        self.engine = engine
        self.link = link
        self.mode = mode
        self._slots = engine.queue.slots
        self._fixed = Plan(
            segment_nbytes or engine.segment_nbytes, depth or self._slots, "as given"
        )
        self._lock = threading.Lock()
        self._planners: dict[tuple[int, int, int, bool, bool], Planner] = {}
        self._numbered: dict[tuple[Planner, Cut], int] = {}
        self._planned: dict[int, tuple[Planner, Cut]] = {}
        # How many of each queue's outcomes were used. Not the queues themselves: they hold memory.
        self._used = [queue.outcomes(0)[0] for queue in engine.queues]
        self._before = engine.stats()
        self._last: dict[int, Plan | tuple[Planner, Cut]] = {}
        self._begun = {False: 0, True: 0}

    def transfer(self, op: int, nbytes: int, *, chunk_nbytes: int = 0, **options: Any) -> Transfer:
        """An empty transfer for about ``nbytes``; see :meth:`Engine.transfer` for the rest.

        ``chunk_nbytes``: what one checksum covers; it must divide the engine's segments.
        """
        plan = self.plan(op, nbytes, chunk_nbytes, options.get("checksum", False))
        return self.engine.transfer(
            op,
            link=self.link,
            segment_nbytes=plan.segment_nbytes,
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
            self._learn()
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
        return Plan(cut.segment_nbytes, cut.depth, "adaptive", number)

    def _learn(self) -> None:
        """Passes the outcomes of finished transfers to their planners."""
        for at, queue in enumerate(self.engine.queues):
            self._used[at], outcomes = queue.outcomes(self._used[at])
            for number, nbytes, took_ns in outcomes:
                if planned := self._planned.get(number):
                    planner, cut = planned
                    planner.note(cut, nbytes, took_ns / 1e9)

    def stats(self) -> dict[str, Any]:
        """What was chosen, and what was reached since this pipeline was made.

        Returns:
            ``mode`` and ``link``; ``drive_gib_s`` and ``link_gib_s`` of the engine while each was
            busy; ``overlap``, the share of the shorter of those times in which both were;
            ``queued``, the share of this pipeline's transfers that began while others were under
            way; ``read`` and ``write`` for the last transfer of each kind: ``segment_nbytes``,
            ``depth``, ``reason``, and ``reached_gib_s`` where it is known.
        """
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
            # The clock is read once in a few commands: one time may come out a little short.
            "overlap": min(1.0, since["overlap_ns"] / shorter) if shorter else 0.0,
            "queued": self._begun[True] / max(1, sum(self._begun.values())),
        }
        with self._lock:
            if self.mode == "adaptive":
                self._learn()
            for op, name in ((READ, "read"), (WRITE, "write")):
                if op in self._last:
                    found[name] = _described(self._last[op])
        return found


def _described(last: Plan | tuple[Planner, Cut]) -> dict[str, Any]:
    if isinstance(last, Plan):
        return {"segment_nbytes": last.segment_nbytes, "depth": last.depth, "reason": last.reason}
    planner, cut = last
    found = {"segment_nbytes": cut.segment_nbytes, "depth": cut.depth, "reason": planner.why()}
    if planner.bytes_per_s:
        found["reached_gib_s"] = planner.bytes_per_s / GIB
    return found
