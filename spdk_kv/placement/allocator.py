"""Which bytes of the drive are in use: extents handed out, taken back and joined again."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from spdk_kv._native.table import BlobTable, ExtentMap
from spdk_kv.errors import CapacityError, CorruptionError
from spdk_kv.units import align_down, align_up, format_nbytes


def damaged_extents(
    extents: Sequence[tuple[int, int]], block_nbytes: int, start: int, end: int
) -> set[int]:
    """Positions of those of ``extents`` (``offset, nbytes``) that no books of one store can have
    together: all that overlap another, are empty or not on a block, or not in ``[start, end)``."""
    damaged = set()
    furthest, whose = 0, -1
    for position in sorted(range(len(extents)), key=extents.__getitem__):
        offset, nbytes = extents[position]
        behind = offset + align_up(nbytes, block_nbytes)
        if nbytes < 1 or offset % block_nbytes or offset < start or behind > end:
            damaged.add(position)
        if nbytes < 1:
            continue
        if offset < furthest:
            # What overlaps any of those before overlaps the one that reaches furthest.
            damaged |= {position, whose}
        if behind > furthest:
            furthest, whose = behind, position
    return damaged


class Allocator:
    """Hands out extents of the drive's bytes ``[start, start + capacity_nbytes)``, best fit first.

    All offsets and sizes are bytes; extents begin and end on multiples of ``block_nbytes``.
    A capacity that is not whole blocks is rounded down. ValueError where the range holds no block
    or ``start`` is not a multiple of the block.

    Not thread-safe: the store calls it under its own lock. Nothing blocks.
    """

    # Free runs are known by address (start -> size and end -> start, so that joining neighbours
    # is two look-ups) and by size (size -> starts, beside a sorted list of the sizes that occur).
    # Only that list costs more as runs multiply, and it stays short: n distinct sizes need at
    # least n*n/2 free blocks, so 1 TiB in 4 KiB blocks has at most 23,170 of them. The extents are
    # bits, since there may be millions.

    def __init__(self, capacity_nbytes: int, block_nbytes: int, start: int = 0) -> None:
        if block_nbytes < 1 or capacity_nbytes < block_nbytes:
            raise ValueError(f"no {block_nbytes}-byte block fits into {capacity_nbytes} bytes")
        if start < 0 or start % block_nbytes:
            raise ValueError(f"start {start} is not a multiple of {block_nbytes} bytes")
        self._block_nbytes = block_nbytes
        self._start = start
        self._end = start + align_down(capacity_nbytes, block_nbytes)
        self._rebuild(self._no_extents())

    @property
    def capacity_nbytes(self) -> int:
        """Bytes managed, free and used."""
        return self._end - self._start

    @property
    def end(self) -> int:
        """The offset behind the last byte managed."""
        return self._end

    @property
    def used_nbytes(self) -> int:
        """Bytes in live extents, whole blocks."""
        return self._used_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes in no extent, contiguous or not."""
        return self.capacity_nbytes - self._used_nbytes

    @property
    def largest_free_nbytes(self) -> int:
        """The longest extent that could be allocated now."""
        return self._sizes[-1] if self._sizes else 0

    @property
    def live(self) -> ExtentMap:
        """The live extents: offset -> whole-block size, in the order of the offsets."""
        return self._used

    @property
    def gaps(self) -> Mapping[int, int]:
        """The free runs: offset -> size."""
        return self._free

    def gap_before(self, offset: int) -> int:
        """Size of the free run that ends at ``offset``; 0 where there is none."""
        return offset - self._free_ends.get(offset, offset)

    def gaps_below(self, end: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the free runs of ``nbytes`` or more, as far as they lie below ``end``."""
        for size in self._sizes[bisect_left(self._sizes, nbytes) :]:
            for start in self._by_size[size]:
                if min(start + size, end) - start >= nbytes:
                    yield start, min(start + size, end)

    def extent_nbytes(self, offset: int) -> int:
        """Whole-block size of the live extent at ``offset``. ValueError where there is none."""
        try:
            return self._used[offset]
        except KeyError:
            raise ValueError(f"no extent begins at offset {offset}") from None

    def allocate(self, nbytes: int) -> int:
        """The offset of a new extent of ``nbytes``, rounded up to whole blocks.

        CapacityError where no free run is long enough; ValueError unless ``nbytes`` is positive.
        """
        nbytes = self._whole_blocks(nbytes)
        if nbytes > self.largest_free_nbytes:
            raise self._no_room(nbytes, 1)
        try:
            return self._allocate_blocks(nbytes)
        except BaseException:
            self._recover()
            raise

    def allocate_many(self, sizes: Sequence[int], end: int | None = None) -> list[int]:
        """Offsets of new extents of ``sizes`` bytes, in that order: all of them, or CapacityError.

        They are neighbours on the drive, in order, wherever one free run holds them all. With
        ``end`` they lie below that offset. ValueError unless every size is positive.
        """
        rounded = [self._whole_blocks(nbytes) for nbytes in sizes]
        if not rounded:
            return []
        try:
            hidden = [] if end is None else self._hide_from(end)
            try:
                offsets = self._allocate_all(rounded)
            except CapacityError:
                self._show(hidden)
                raise
            self._show(hidden)
            return offsets
        except CapacityError:
            raise
        except BaseException:
            self._recover()
            raise

    def _hide_from(self, end: int) -> list[tuple[int, int]]:
        """Takes the free runs out of the books as far as they lie behind ``end``. Returns them as
        (offset, size)."""
        beyond = [(start, n) for start, n in self._free.items() if start + n > end]
        hidden = []
        for start, nbytes in beyond:
            self._remove_free(start)
            first = max(start, end)
            if first > start:
                self._add_free(start, first - start)
            hidden.append((first, start + nbytes - first))
        return hidden

    def _show(self, hidden: list[tuple[int, int]]) -> None:
        """Takes what :meth:`_hide_from` returned into the books again."""
        for start, nbytes in hidden:
            self._add_joined(start, nbytes)

    def _allocate_all(self, rounded: list[int]) -> list[int]:
        total = sum(rounded)
        if total <= self.largest_free_nbytes:
            offsets = self._used.add_run(self._take(total), rounded)
            self._used_nbytes += total
            return offsets
        if total > self.free_nbytes:
            raise self._no_room(total, len(rounded))
        # Largest first: a small extent must not break up the one run that a large one needs.
        found: dict[int, int] = {}
        for position in sorted(range(len(rounded)), key=rounded.__getitem__, reverse=True):
            if rounded[position] > self.largest_free_nbytes:
                for offset in found.values():
                    self.free(offset)
                raise self._no_room(total, len(rounded))
            found[position] = self._allocate_blocks(rounded[position])
        return [found[position] for position in range(len(rounded))]

    def free(self, offset: int) -> None:
        """Takes the extent at ``offset`` back. ValueError where none begins there (freed twice)."""
        nbytes = self.extent_nbytes(offset)
        try:
            self._free_blocks(offset, nbytes)
        except BaseException:
            self._recover()
            raise

    def free_many(self, offsets: Iterable[int]) -> None:
        """As :meth:`free`, of all ``offsets`` or none; neighbours at once."""
        wanted = list(offsets)
        try:
            for offset, nbytes in self._used.take(wanted):
                self._used_nbytes -= nbytes
                self._add_joined(offset, nbytes)
        except KeyError as missing:
            raise ValueError(f"no extent begins at offset {missing.args[0]}") from None
        except BaseException:
            self._recover()
            raise

    def _free_blocks(self, offset: int, nbytes: int) -> None:
        del self._used[offset]
        self._used_nbytes -= nbytes
        self._add_joined(offset, nbytes)

    def _add_joined(self, offset: int, nbytes: int) -> None:
        following_nbytes = self._free.get(offset + nbytes)
        if following_nbytes is not None:
            self._remove_free(offset + nbytes)
            nbytes += following_nbytes
        preceding = self._free_ends.get(offset)
        if preceding is not None:
            nbytes += self._remove_free(preceding)
            offset = preceding
        self._add_free(offset, nbytes)

    def reserve_all(self, extents: Iterable[tuple[int, int]]) -> None:
        """Marks extents ``(offset, nbytes)`` of a reopened store as live: all of them, or none.

        Sizes are rounded up as ``allocate`` does. CorruptionError where an extent is empty, not
        on a block, out of range or overlaps another. Each call sorts all live extents, so one
        call should have them all.
        """
        block = self._block_nbytes
        live = [*self._used.items(), *extents]
        live.sort()
        used = self._no_extents()
        end = self._start
        for offset, nbytes in live:
            if nbytes < 1 or offset % block:
                raise CorruptionError(
                    f"recorded extent at offset {offset} of {nbytes} bytes is empty or not on a "
                    f"{block}-byte block"
                )
            nbytes = align_up(nbytes, block)
            if offset < self._start or offset + nbytes > self._end:
                raise CorruptionError(
                    f"recorded extent at offset {offset} of {nbytes} bytes lies outside "
                    f"[{self._start}, {self._end})"
                )
            if offset < end:
                raise CorruptionError(
                    f"recorded extents overlap: one begins at offset {offset}, before the end "
                    f"{end} of its neighbour"
                )
            used[offset] = nbytes
            end = offset + nbytes
        self._rebuild(used)

    def reserve_blobs(self, blobs: BlobTable[Any], extents: Iterable[tuple[int, int]] = ()) -> bool:
        """As :meth:`reserve_all`, of all ``blobs`` and of ``extents``, and much faster. False, and
        nothing is reserved, where that says that something is wrong, but not what."""
        used = self._no_extents()
        try:
            for offset, nbytes in (*self._used.items(), *extents):
                used[offset] = self._whole_blocks(nbytes)
        except ValueError:
            return False
        if not blobs.reserve(used) or not used.check():
            return False
        self._rebuild(used)
        return True

    def check(self) -> None:
        """Proves the books: extents and joined free runs tile the range, and all indices agree.

        CorruptionError says what is wrong. Takes time in proportion to the extents.
        """
        end = self._start
        after_free = False
        for offset, nbytes in sorted([*self._used.items(), *self._free.items()]):
            free = offset in self._free
            if offset != end or nbytes < 1 or nbytes % self._block_nbytes:
                raise CorruptionError(f"allocator: gap, overlap or part of a block at {offset}")
            if free and after_free:
                raise CorruptionError(f"allocator: free runs are not joined at offset {offset}")
            end = offset + nbytes
            after_free = free
        if end != self._end:
            raise CorruptionError(f"allocator: runs end at {end}, the drive at {self._end}")
        if self._used_nbytes != self._used.total() or not self._used.check():
            raise CorruptionError("allocator: used bytes do not sum up")
        if self._free_ends != {start + nbytes: start for start, nbytes in self._free.items()}:
            raise CorruptionError("allocator: the index of run ends disagrees with the runs")
        by_size = {start: nbytes for nbytes, runs in self._by_size.items() for start in runs}
        if by_size != self._free or self._sizes != sorted(self._by_size):
            raise CorruptionError("allocator: the index by size disagrees with the runs")

    def _whole_blocks(self, nbytes: int) -> int:
        if nbytes < 1:
            raise ValueError(f"an extent holds at least one byte, not {nbytes}")
        return align_up(nbytes, self._block_nbytes)

    def _no_room(self, nbytes: int, count: int) -> CapacityError:
        return CapacityError(
            f"no room for {format_nbytes(nbytes)} ({nbytes} bytes in {count} extent(s)): "
            f"{format_nbytes(self.free_nbytes)} of {format_nbytes(self.capacity_nbytes)} are free "
            f"({self.free_nbytes} bytes), the largest contiguous run is "
            f"{format_nbytes(self.largest_free_nbytes)} ({self.largest_free_nbytes} bytes)"
        )

    def _allocate_blocks(self, nbytes: int) -> int:
        offset = self._take(nbytes)
        self._used[offset] = nbytes
        self._used_nbytes += nbytes
        return offset

    def _take(self, nbytes: int) -> int:
        """Cuts ``nbytes`` off the front of the shortest run that holds them; there must be one."""
        size = self._sizes[bisect_left(self._sizes, nbytes)]
        start = next(reversed(self._by_size[size]))
        self._remove_free(start)
        if size > nbytes:
            self._add_free(start + nbytes, size - nbytes)
        return start

    def _add_free(self, start: int, nbytes: int) -> None:
        self._free[start] = nbytes
        self._free_ends[start + nbytes] = start
        runs = self._by_size.get(nbytes)
        if runs is None:
            self._by_size[nbytes] = {start: None}
            insort(self._sizes, nbytes)
        else:
            runs[start] = None

    def _remove_free(self, start: int) -> int:
        nbytes = self._free.pop(start)
        del self._free_ends[start + nbytes]
        runs = self._by_size[nbytes]
        del runs[start]
        if not runs:
            del self._by_size[nbytes]
            del self._sizes[bisect_left(self._sizes, nbytes)]
        return nbytes

    def _recover(self) -> None:
        """Rebuilds what is free from the extents, which change in one step, after a signal handler
        (Ctrl-C) raised between two steps."""
        self._rebuild(self._used)

    def _no_extents(self) -> ExtentMap:
        return ExtentMap(self._start, self._end, self._block_nbytes)

    def _rebuild(self, used: ExtentMap) -> None:
        """``used``: the extents; everything between them is free."""
        self._used = used
        self._used_nbytes = used.total()
        self._free: dict[int, int] = {}
        self._free_ends: dict[int, int] = {}
        # The inner dicts are sets that keep their order: the run freed last is used first.
        self._by_size: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []
        for offset, nbytes in used.gaps():
            self._add_free(offset, nbytes)

    def take_free(self, run: int, start: int, nbytes: int) -> bool:
        """Makes ``[start, start + nbytes)``, whole blocks within the free run that begins at
        ``run``, an extent. False, and nothing changes, where that is not free (any more)."""
        size = self._free.get(run, 0)
        if not run <= start < start + nbytes <= run + size:
            return False
        try:
            self._remove_free(run)
            self._used[start] = nbytes
            self._used_nbytes += nbytes
            for first, end in ((run, start), (start + nbytes, run + size)):
                if first < end:
                    self._add_free(first, end - first)
        except BaseException:
            self._recover()
            raise
        return True

    @contextmanager
    def without(self, ranges: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Within it nothing of ``ranges`` (start, end) is handed out. It takes time in proportion
        to the extents."""
        try:
            for start, end in ranges:
                self._hide(start, end)
            yield
        finally:
            self._recover()

    def _hide(self, start: int, end: int) -> None:
        touched = [(run, n) for run, n in self._free.items() if run < end and run + n > start]
        for run, nbytes in touched:
            self._remove_free(run)
            for first, last in ((run, min(start, run + nbytes)), (max(end, run), run + nbytes)):
                if first < last:
                    self._add_free(first, last - first)
