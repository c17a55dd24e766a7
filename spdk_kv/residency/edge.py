"""The edge: the fraction of the available memory at which the kernel starts to evict.

It is learnt from cuts, as AIMD learns a link's capacity from losses: a miss cuts the edge, and a
run of clean decisions probes a little beyond it.
"""

from __future__ import annotations

from spdk_kv.residency.evidence import Evidence
from spdk_kv.units import MIB

# All constants here were chosen with the simulated LRU cache of tests/residency/model.py, unless
# another source is named.

# The margin left free before anything is learnt: 4 % + 32 MiB; with little memory, 4 % + 1/16.
_MARGIN_DIVISOR = 25
_MARGIN_NBYTES = 32 * MIB
_MARGIN_SMALL_DIVISOR = 16

SAFETY = 0.02
"""Share by which the budget stays under a known edge; doubled by cuts that follow each other."""
_MAX_SAFETY = 0.32
_CUT_MEMORY = 4  # decisions after which a cut no longer counts as following another

WORTH = 0.015
"""A raise by less than this share of the available memory is not worth moving units for."""

# Clean decisions before the edge is probed, and the share of the available memory by which it is
# then moved up. A probe that succeeds makes the next one come sooner and go further.
_PROBE_AFTER = 32
_MIN_PROBE_AFTER, _MAX_PROBE_AFTER = 8, 512
_PROBE_STEP = 0.02
_MAX_PROBE_STEP = 0.16
_SAME_EDGE = 0.04  # edges nearer than this share of the available memory are the same


def margin(available: int) -> int:
    """Bytes of ``available`` that are left free as long as nothing else is learnt."""
    return available // _MARGIN_DIVISOR + min(_MARGIN_NBYTES, available // _MARGIN_SMALL_DIVISOR)


class Edge:
    """Where the kernel evicts, as far as it is known. Numbers only."""

    def __init__(self) -> None:
        self.fraction = 1.0  # of the available memory; 1: an eviction was never seen
        self._kept_fraction = 0.0  # largest that the kernel was seen to keep since the last cut
        self._clean = 0  # clean decisions since the last cut or probe
        self._probe_after = _PROBE_AFTER
        self._probe_step = _PROBE_STEP
        self._was_probed = False  # since the last cut
        self._cut_fraction = 1.0  # where the last cut put the edge
        self._kept_at_probe = 0.0  # the kept fraction when the edge was last probed
        self._consecutive_cuts = 0
        self._since_cut = _CUT_MEMORY

    def next_decision(self) -> None:
        """Counts a decision, of whatever kind."""
        self._since_cut += 1

    def ceiling(self, available: int) -> int:
        """The largest budget that is safe with ``available`` bytes."""
        return self._ceiling(available, margin(available), SAFETY)

    def tolerance(self, available: int) -> int:
        """The largest budget that need not fall: half the margin above the ceiling, so that small
        changes of ``available`` do not move it."""
        return self._ceiling(available, margin(available) // 2, SAFETY / 2)

    def _ceiling(self, available: int, free: int, safety: float) -> int:
        known = available
        if self.fraction < 1.0:
            known = int(available * self.fraction * (1 - safety))
        return max(0, min(available - free, known))

    def cut(self, seen: Evidence, budget: int) -> tuple[int, int]:
        """The kernel evicted under ``budget``.

        Returns:
            The budget from now on, and the bytes that the kernel seems to keep.
        """
        available = seen.available
        is_consecutive = self._since_cut <= _CUT_MEMORY
        self._consecutive_cuts = self._consecutive_cuts + 1 if is_consecutive else 0
        if self._kept_fraction * available >= seen.kept * (1 - SAFETY):
            self._kept_fraction = 0.0  # what was kept before is not any more
        keeps, too_much = self._estimate(seen)
        safety = min(_MAX_SAFETY, SAFETY * 2**self._consecutive_cuts)
        budget = min(budget, int(keeps * (1 - safety)))
        if available:
            self.fraction = min(1.0, too_much / available)
            self._kept_fraction = min(self._kept_fraction, budget / available)
        again = self._was_probed and abs(self.fraction - self._cut_fraction) < _SAME_EDGE
        self._probe_after = min(_MAX_PROBE_AFTER, self._probe_after * 2) if again else _PROBE_AFTER
        self._cut_fraction = self.fraction
        self._probe_step = _PROBE_STEP
        self._was_probed = False
        self._clean = 0
        self._since_cut = 0
        return budget, int(keeps)

    def _estimate(self, seen: Evidence) -> tuple[float, float]:
        """Bytes that the kernel keeps for us, and the least amount known to be too much."""
        if seen.resident is not None:
            keeps = float(min(seen.resident, seen.kept))
            return keeps, keeps
        # A scan that thrashes hits next to nothing wherever the edge is, so the hits are only a
        # lower bound. Try what was kept before, or half; believe the hits where that failed as
        # well.
        keeps = seen.hit_ratio * seen.kept
        if self._consecutive_cuts == 0:
            kept_before = self._kept_fraction * seen.available
            keeps = max(keeps, kept_before if kept_before else seen.kept / 2)
        return keeps, float(seen.kept)

    def record_clean(self, seen: Evidence, budget: int) -> None:
        """Nothing was evicted under ``budget``; probes beyond the edge when that has lasted."""
        if seen.available:
            kept = min(seen.kept, budget) / seen.available
            self._kept_fraction = max(self._kept_fraction, kept)
        if self.fraction == 1.0:
            return
        self._clean += 1
        at_edge = self.ceiling(seen.available) - budget <= WORTH * seen.available
        # A probe that let no further unit in has shown nothing.
        untried = self._was_probed and self._kept_fraction <= self._kept_at_probe
        if at_edge and self._clean >= (_MIN_PROBE_AFTER if untried else self._probe_after):
            self._probe()

    def _probe(self) -> None:
        # The last probe succeeded if more is kept since than what had been too much.
        if self._was_probed and self._kept_fraction > self._cut_fraction:
            self._probe_after = max(_MIN_PROBE_AFTER, self._probe_after // 2)
            self._probe_step = min(_MAX_PROBE_STEP, self._probe_step * 2)
        self.fraction = min(1.0, self.fraction + self._probe_step)
        self._was_probed, self._kept_at_probe = True, self._kept_fraction
        self._clean = 0
