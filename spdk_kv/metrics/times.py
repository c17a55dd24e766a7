"""Histograms of times: sums up to a bound, and the time below which a share of them is."""

from __future__ import annotations

from collections.abc import Iterator

from spdk_kv.metrics.sample import Times

# Powers of two of nanoseconds, where buckets of the native histograms end: 8.2 us to 8.6 s. Counts
# up to each are exact.
BOUNDS_NS = tuple(1 << exponent for exponent in range(13, 34))


def cumulated(times: Times) -> Iterator[tuple[int | None, int]]:
    """(bound in nanoseconds, how many took less) for each bound; the last one is None, with all."""
    ends = sorted(times)
    at = total = 0
    for bound in BOUNDS_NS:
        while at < len(ends) and ends[at] <= bound:
            total += times[ends[at]]
            at += 1
        yield bound, total
    yield None, total + sum(times[end] for end in ends[at:])


def share_below(times: Times, share: float) -> float | None:
    """The seconds below which ``share`` of the times are (0.5: the median), to within a quarter of
    it; None where there are none."""
    wanted = share * sum(times.values())
    below = 0
    for end_ns in sorted(times):
        count = times[end_ns]
        if count and below + count >= wanted:
            # Buckets are a quarter of the doubling that they are in.
            width = 1 << max(0, (end_ns - 1).bit_length() - 3)
            return (end_ns - width + width * (wanted - below) / count) / 1e9
        below += count
    return None
