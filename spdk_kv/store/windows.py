"""Which blobs to evict for new extents: neighbours that are old, and not many more than needed.

An extent needs contiguous space, so what is evicted is a *window*: blobs that are neighbours on the
drive, with the free space between them. The price of a blob is its size over its age, counted in
uses of blobs since its own last one: of two windows as large the older one goes, and a large one
goes instead of a small one only if it is that much older.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from spdk_kv.store.records import Records

# A window begins at one of the blobs used longest ago. For each that is wanted, this many more
# beginnings are looked at (and a few at least), and the cheapest windows taken.
_CHOICE = 4
_LEAST_CHOICE = 32
# Extents looked at in this way. Windows that were not found by then are sought at all beginnings.
_MOST_STEPS = 20_000


class Window(NamedTuple):
    """A range ``[start, end)`` of the drive that is free once the blobs at ``victims`` are gone."""

    price: float
    start: int
    end: int
    victims: Sequence[int]


class Run(NamedTuple):
    """A blob, or a gap between extents, whose price is 0."""

    start: int
    end: int
    price: float


class Windows:
    """Finds windows in what ``records`` hold, below the offset ``end``. Made and used under the
    records' lock."""

    def __init__(self, records: Records, end: int) -> None:
        self._records = records
        self._allocator = records.extents.allocator
        self._end = end

    def choose(self, sizes: Sequence[int], ahead_nbytes: int) -> list[int] | None:
        """The offsets of blobs without which there are extents of ``sizes`` bytes (whole blocks);
        None if there would not be those without any blob.

        ``ahead_nbytes``: more that is made free in the same way, for extents to come.
        """
        chosen = self._choose_each(sorted(sizes, reverse=True), ahead_nbytes)
        if chosen is None and len(sizes) > 1:
            chosen = self._choose_each([sum(sizes)], 0)
        if chosen is None:
            return None
        return [offset for window in chosen for offset in window.victims]

    def largest(self) -> int:
        """Bytes of the largest extent that there could be without any blob."""
        largest = start = end = 0
        for run in self._runs(self._end + 1):
            if run.start != end:
                start = run.start
            end = run.end
            largest = max(largest, end - start)
        return largest

    def _choose_each(self, sizes: list[int], ahead_nbytes: int) -> list[Window] | None:
        """Windows for those of ``sizes``, largest first, that find no gap."""
        gaps = self._allocator.gaps_below(self._end, sizes[-1])
        runs = sorted(end - start for start, end in gaps)
        missing = _deal_out(sizes, runs)
        taken: list[Window] = []
        while missing:
            count = missing.count(missing[0])
            ahead = 0 if count < len(missing) else ahead_nbytes
            found = self._cheapest(missing[0], sizes[-1], count, ahead, taken)
            if found is None:
                return None
            taken += found
            for window in found:
                insort(runs, window.end - window.start)
            missing = _deal_out(missing, runs)
        return taken

    def _cheapest(
        self, nbytes: int, smallest: int, count: int, ahead_nbytes: int, taken: list[Window]
    ) -> list[Window] | None:
        """Windows that hold ``count`` extents of ``nbytes``, apart from those ``taken``, and about
        ``ahead_nbytes`` in more of them; None if there are not so many. ``smallest``: gaps from
        this size on are other extents' already."""

        def price_each(window: Window) -> float:
            return window.price / min(most, (window.end - window.start) // nbytes)

        most = count + ahead_nbytes // nbytes
        claimed = {offset for window in taken for offset in window.victims}
        choice = most + max(_LEAST_CHOICE, _CHOICE * count)
        windows = islice(self._from_the_oldest(nbytes, smallest, claimed), choice)
        found = _apart(sorted(windows, key=price_each), nbytes, count, ahead_nbytes, taken)
        if found is not None:
            return found
        # Rare: from all beginnings, the cheapest ones, or else as many as there are.
        runs = [run for run in self._runs(smallest) if run.start not in claimed]
        everywhere = _everywhere(runs, nbytes)
        for order in (price_each, attrgetter("end")):
            found = _apart(sorted(everywhere, key=order), nbytes, count, 0, taken)
            if found is not None:
                return [_with_victims(window, runs) for window in found]
        return None

    def _from_the_oldest(self, nbytes: int, smallest: int, claimed: set[int]) -> Iterator[Window]:
        """The shortest window that begins with a blob, for each of the blobs used longest ago."""
        used_at, is_pinned = self._records.residents.used_at, self._records.extents.is_pinned
        live, gaps = self._allocator.live, self._allocator.gaps
        now = self._records.residents.now + 1
        steps = 0
        for at in self._records.residents.oldest():
            if steps > _MOST_STEPS:
                return
            start = at - self._allocator.gap_before(at) % smallest
            price, victims = 0.0, []
            while at - start < nbytes:
                steps += 1
                used = used_at(at)
                if used is None:  # a gap, or what cannot be evicted
                    run = min(gaps.get(at, 0), self._end - at)
                    if not 0 < run < smallest:
                        break
                elif at in claimed or is_pinned(at):
                    break
                else:
                    run = live[at]
                    price += run / (now - used)
                    victims.append(at)
                at += run
            else:
                yield Window(price, start, at, victims)

    def _runs(self, smallest: int) -> list[Run]:
        """What is free or can be evicted, by address. Of gaps that are other extents' already, what
        those leave."""
        residents, is_pinned = self._records.residents, self._records.extents.is_pinned
        now = residents.now + 1
        runs = []
        for offset in residents.offsets():
            used_at = residents.used_at(offset)
            if used_at is not None and not is_pinned(offset):
                nbytes = self._allocator.live[offset]
                runs.append(Run(offset, offset + nbytes, nbytes / (now - used_at)))
        for start, end in self._allocator.gaps_below(self._end, 1):
            if left := (end - start) % smallest:
                runs.append(Run(end - left, end, 0.0))
        runs.sort()
        return runs


def _everywhere(runs: list[Run], nbytes: int) -> list[Window]:
    """The shortest window of ``nbytes`` from each of ``runs`` on. Their victims are the places of
    the first and last one among ``runs``: listing them all would take long."""
    windows = []
    last, price = 0, 0.0  # the window is runs[first:last]
    for first, run in enumerate(runs):
        if last <= first:
            last, price = first + 1, run.price
        while runs[last - 1].end - run.start < nbytes:
            if last == len(runs) or runs[last].start != runs[last - 1].end:
                break
            price += runs[last].price
            last += 1
        else:
            windows.append(Window(price, run.start, runs[last - 1].end, (first, last)))
        price -= run.price
    return windows


def _with_victims(window: Window, runs: list[Run]) -> Window:
    first, last = window.victims
    return window._replace(victims=[run.start for run in runs[first:last] if run.price])


def _apart(
    windows: Iterable[Window], nbytes: int, count: int, ahead_nbytes: int, taken: Sequence[Window]
) -> list[Window] | None:
    """The first of ``windows`` that overlap neither each other nor one ``taken``, until they hold
    ``count`` extents of ``nbytes`` and come to ``ahead_nbytes`` more. None if they don't."""
    starts = sorted(window.start for window in taken)
    ends = sorted(window.end for window in taken)
    found: list[Window] = []
    for window in windows:
        if count <= 0:
            ahead_nbytes -= window.end - window.start
            if ahead_nbytes < 0:
                break
        # Those taken are apart, so their starts and ends are in the same order.
        at = bisect_left(starts, window.end)
        if at and ends[at - 1] > window.start:
            continue
        starts.insert(at, window.start)
        ends.insert(at, window.end)
        found.append(window)
        count -= (window.end - window.start) // nbytes
    return found if count <= 0 else None


def _deal_out(sizes: Sequence[int], runs: list[int]) -> list[int]:
    """Takes ``sizes``, largest first, out of ``runs`` as the allocator does; returns those that
    find none. ``runs`` is sorted and stays so."""
    missing = []
    for nbytes in sizes:
        at = bisect_left(runs, nbytes)
        if at == len(runs):
            missing.append(nbytes)
        else:
            insort(runs, runs.pop(at) - nbytes)
    return missing
