"""Which misses do not show that the budget is too large."""

from __future__ import annotations

from spdk_kv.residency.evidence import Evidence

# Chosen with the simulated LRU cache of tests/residency/model.py.
_SCAN_FRACTION = 0.9  # read again above this share of what is kept makes a scan
_FULL_FRACTION = 0.99  # resident above this share of what is kept means that nothing is missing
_REFILL_HIT_SHARE = 0.4  # hits, as a share of what is still kept, by which a refill has worked


class Misses:
    """Excuses misses that refill the cache after it was emptied once. Numbers only.

    A cache that was emptied once fills again; one that is too small does not.
    """

    def __init__(self) -> None:
        # The refill that is under way: misses still excused, bytes read since it began, and the
        # hit ratio that the step which ends it must reach.
        self._excused = 0
        self._read = 0
        self._refill_ratio = 0.0
        self._suspect: int | None = None  # resident bytes when misses were seen and not yet judged

    def expect_refill(self, nbytes: int, kept: int) -> None:
        """Up to ``nbytes`` of the ``kept`` ones may be missed once, in the next scan."""
        self._suspect = None
        self._excused = nbytes
        self._read = 0
        self._refill_ratio = _REFILL_HIT_SHARE * min(1.0, nbytes / kept) if kept else 0.0

    def clear(self) -> None:
        """Nothing was missed: the cache is full."""
        self._excused, self._suspect = 0, None

    def are_refill(self, seen: Evidence) -> bool:
        """Whether the misses belong to the scan that refills what the kernel had dropped."""
        excused, self._excused = self._excused, max(0, self._excused - seen.missed)
        self._read += seen.read
        if seen.missed > excused:
            return False
        if self._read < _SCAN_FRACTION * seen.kept:
            return True
        self._excused = 0
        if seen.resident is not None:
            return seen.resident >= _FULL_FRACTION * seen.kept
        return seen.hit_ratio >= self._refill_ratio

    def may_be_passing(self, seen: Evidence) -> bool:
        """Whether the misses may come from a cache that was emptied once. The next call judges by
        whether it has filled since."""
        suspect, self._suspect = self._suspect, None
        if seen.resident is None:
            return False
        if suspect is None:
            is_scan = seen.read >= _SCAN_FRACTION * seen.kept
            # Emptied within a scan, it was hit before that, and has filled again since.
            if is_scan and seen.hit_ratio * seen.kept + seen.resident < seen.kept:
                return False
            self._suspect = seen.resident
            return True
        if seen.resident >= suspect + seen.missed / 2:
            self.expect_refill(seen.kept, seen.kept)
            return True
        return False
