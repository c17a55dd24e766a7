"""The allocator against a bitmap, and its errors."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spdk_kv.errors import CapacityError, CorruptionError
from spdk_kv.placement.allocator import Allocator, damaged_extents
from spdk_kv.units import align_up
from support.interrupts import interrupted_everywhere
from support.rounds import examples

BLOCK = 512
START = 8 * BLOCK
NBLOCKS = 48


class AgainstBitmap(RuleBasedStateMachine):
    """One bool per block says what must be in use."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(NBLOCKS * BLOCK + 100, BLOCK, START)
        self.bitmap = [False] * NBLOCKS
        self.live: dict[int, int] = {}

    def runs(self) -> list[int]:
        text = "".join("x" if used else "." for used in self.bitmap)
        return [len(run) * BLOCK for run in text.split("x") if run]

    def run_around(self, offset: int) -> int:
        first = last = (offset - START) // BLOCK
        while first > 0 and not self.bitmap[first - 1]:
            first -= 1
        while last < NBLOCKS and not self.bitmap[last]:
            last += 1
        return (last - first) * BLOCK

    def mark(self, offset: int, nbytes: int, used: bool) -> None:
        first = (offset - START) // BLOCK
        blocks = range(first, first + -(-nbytes // BLOCK))
        assert offset % BLOCK == 0
        assert blocks.start >= 0
        assert blocks.stop <= NBLOCKS
        assert all(self.bitmap[block] is not used for block in blocks)
        for block in blocks:
            self.bitmap[block] = used
        if used:
            self.live[offset] = len(blocks) * BLOCK

    @rule(nbytes=st.integers(1, 12 * BLOCK))
    def allocate(self, nbytes: int) -> None:
        fitting = [run for run in self.runs() if run >= nbytes]
        if not fitting:
            with pytest.raises(CapacityError):
                self.allocator.allocate(nbytes)
            return
        offset = self.allocator.allocate(nbytes)
        assert self.run_around(offset) == min(fitting)
        self.mark(offset, nbytes, True)

    @rule(sizes=st.lists(st.integers(1, 8 * BLOCK), max_size=8))
    def allocate_many(self, sizes: list[int]) -> None:
        try:
            offsets = self.allocator.allocate_many(sizes)
        except CapacityError:
            rounded = sum(-(-nbytes // BLOCK) * BLOCK for nbytes in sizes)
            assert rounded > max(self.runs(), default=0)
            return
        assert len(offsets) == len(sizes)
        for offset, nbytes in zip(offsets, sizes, strict=True):
            self.mark(offset, nbytes, True)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        self.allocator.free(offset)
        self.mark(offset, self.live.pop(offset), False)
        with pytest.raises(ValueError, match="no extent"):
            self.allocator.free(offset)

    @rule(first=st.integers(0, NBLOCKS - 1), count=st.integers(1, 8))
    def take_free(self, first: int, count: int) -> None:
        start, nbytes = START + first * BLOCK, count * BLOCK
        runs = self.allocator.gaps.items()
        run = next((at for at, n in runs if at <= start and start + nbytes <= at + n), None)
        blocks = range(first, first + count)
        free = blocks.stop <= NBLOCKS and not any(self.bitmap[block] for block in blocks)
        assert (run is not None) == free
        taken = self.allocator.take_free(start if run is None else run, start, nbytes)
        assert taken == free
        if taken:
            self.mark(start, nbytes, True)

    @rule(data=st.data(), nbytes=st.integers(1, 8 * BLOCK))
    def allocate_without(self, data: st.DataObject, nbytes: int) -> None:
        edges = data.draw(st.lists(st.integers(0, NBLOCKS), max_size=6, unique=True).map(sorted))
        pairs = list(zip(edges[::2], edges[1::2], strict=False))
        hidden = {block for pair in pairs for block in range(*pair)}
        usable = "".join(
            "x" if used or block in hidden else "." for block, used in enumerate(self.bitmap)
        )
        fitting = [len(run) * BLOCK for run in usable.split("x") if len(run) * BLOCK >= nbytes]
        with self.allocator.without((START + a * BLOCK, START + b * BLOCK) for a, b in pairs):
            try:
                offset = self.allocator.allocate(nbytes)
            except CapacityError:
                assert not fitting
                return
        assert fitting
        self.mark(offset, nbytes, True)
        first = (offset - START) // BLOCK
        assert not hidden & set(range(first, first + self.live[offset] // BLOCK))

    @rule(first=st.integers(-2, NBLOCKS + 1), nbytes=st.integers(-1, 6 * BLOCK))
    def reserve(self, first: int, nbytes: int) -> None:
        blocks = range(first, first + -(-nbytes // BLOCK))
        inside = nbytes > 0 and blocks.start >= 0 and blocks.stop <= NBLOCKS
        extent = (START + first * BLOCK, nbytes)
        if inside and not any(self.bitmap[block] for block in blocks):
            self.allocator.reserve_all([extent])
            self.mark(*extent, True)
        else:
            with pytest.raises(CorruptionError):
                self.allocator.reserve_all([extent])

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check()
        assert self.allocator.capacity_nbytes == NBLOCKS * BLOCK
        assert self.allocator.used_nbytes == sum(self.bitmap) * BLOCK
        assert self.allocator.free_nbytes == (NBLOCKS - sum(self.bitmap)) * BLOCK
        assert self.allocator.largest_free_nbytes == max(self.runs(), default=0)
        for offset, nbytes in self.live.items():
            assert self.allocator.extent_nbytes(offset) == nbytes


TestAgainstBitmap = AgainstBitmap.TestCase
TestAgainstBitmap.settings = settings(max_examples=examples(60), stateful_step_count=40)


def fragmented() -> Allocator:
    """Free runs of 1, 2 and 3 blocks, in that order, each between used blocks."""
    allocator = Allocator(16 * BLOCK, BLOCK)
    offsets = allocator.allocate_many([n * BLOCK for n in (1, 1, 1, 2, 1, 3, 7)])
    for offset in offsets[1:6:2]:
        allocator.free(offset)
    return allocator


def test_the_shortest_run_that_fits_is_taken() -> None:
    allocator = fragmented()
    assert allocator.allocate(2 * BLOCK) == 3 * BLOCK
    assert allocator.allocate(1) == BLOCK
    assert allocator.allocate(2 * BLOCK + 1) == 6 * BLOCK
    assert allocator.free_nbytes == 0


def test_capacity_error_says_what_is_asked_what_is_free_and_the_longest_run() -> None:
    with pytest.raises(CapacityError) as caught:
        fragmented().allocate(4 * BLOCK)
    for part in ("2048 bytes in 1 extent", "3072 bytes", "1536 bytes"):
        assert part in str(caught.value)


def test_many_extents_are_neighbours_where_one_run_holds_them() -> None:
    allocator = Allocator(64 * BLOCK, BLOCK, START)
    assert allocator.allocate_many([1, BLOCK + 1, BLOCK]) == [
        START,
        START + BLOCK,
        START + 3 * BLOCK,
    ]
    assert allocator.allocate_many([]) == []


def test_many_extents_fill_separate_runs_without_starving_the_longest() -> None:
    allocator = Allocator(9 * BLOCK, BLOCK)
    offsets = allocator.allocate_many([n * BLOCK for n in (3, 1, 4, 1)])
    allocator.free(offsets[0])
    allocator.free(offsets[2])
    assert allocator.allocate_many([2 * BLOCK, 2 * BLOCK, 3 * BLOCK]) == [
        4 * BLOCK,
        6 * BLOCK,
        0,
    ]


def test_many_extents_that_do_not_all_fit_leave_nothing_behind() -> None:
    allocator = fragmented()
    with pytest.raises(CapacityError):
        allocator.allocate_many([3 * BLOCK, 3 * BLOCK])
    assert allocator.free_nbytes == 6 * BLOCK
    assert allocator.largest_free_nbytes == 3 * BLOCK
    allocator.check()


def test_a_refused_reservation_changes_nothing() -> None:
    allocator = Allocator(16 * BLOCK, BLOCK)
    allocator.reserve_all([(4 * BLOCK, 1)])
    for extents in (
        [(0, BLOCK), (BLOCK - 1, 1)],
        [(0, BLOCK), (3 * BLOCK, BLOCK + 1)],
        [(0, BLOCK), (0, BLOCK)],
        [(16 * BLOCK, 1)],
    ):
        with pytest.raises(CorruptionError):
            allocator.reserve_all(extents)
    assert allocator.used_nbytes == BLOCK
    allocator.check()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_extent_without_bytes_is_refused(nbytes: int) -> None:
    allocator = Allocator(16 * BLOCK, BLOCK)
    with pytest.raises(ValueError, match="at least one byte"):
        allocator.allocate(nbytes)
    with pytest.raises(ValueError, match="at least one byte"):
        allocator.allocate_many([1, nbytes])
    assert allocator.used_nbytes == 0


@pytest.mark.parametrize("arguments", [(1, 1), (512, 512, 0), (1023, 512, 512)])
def test_one_block_is_enough(arguments: tuple[int, ...]) -> None:
    allocator = Allocator(*arguments)
    block = arguments[1]
    assert allocator.capacity_nbytes == allocator.free_nbytes == block
    assert allocator.allocate(block) == (*arguments, 0)[2]
    assert allocator.free_nbytes == 0


@pytest.mark.parametrize(
    "arguments", [(511, 512, 0), (512, 0, 0), (1024, 512, 100), (1024, 512, -512), (512, -512, 0)]
)
def test_a_range_without_a_whole_block_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"block|multiple"):
        Allocator(*arguments)


@pytest.mark.parametrize("damage", ["_used", "_free", "_free_ends", "_by_size", "_sizes"])
def test_the_self_check_finds_damage_in_every_index(damage: str) -> None:
    allocator = fragmented()
    index = getattr(allocator, damage)
    if damage == "_used":
        index.pop(max(index))
    elif isinstance(index, dict):
        index.popitem()
    else:
        index.pop()
    with pytest.raises(CorruptionError, match="allocator"):
        allocator.check()


@pytest.mark.parametrize("damage", ["end", "gap", "joined"])
def test_the_self_check_finds_runs_that_do_not_tile_the_range(damage: str) -> None:
    allocator = fragmented()
    if damage == "end":  # the last extent, with its bytes
        allocator._used_nbytes -= allocator._used.pop(max(allocator._used))
    elif damage == "gap":
        allocator._used_nbytes -= allocator._used.pop(0)
    else:  # what is free lies in two runs, which all indices have
        allocator.free(2 * BLOCK)
        allocator._remove_free(BLOCK)
        allocator._add_free(BLOCK, BLOCK)
        allocator._add_free(2 * BLOCK, 3 * BLOCK)
    with pytest.raises(CorruptionError, match={"end": "runs end at"}.get(damage, damage)):
        allocator.check()


def test_gaps_are_listed_as_far_as_they_lie_below_the_end() -> None:
    allocator = fragmented()  # [1, 2), [3, 5), [6, 9)
    every = sorted((start // BLOCK, end // BLOCK) for start, end in allocator.gaps_below(10**6, 1))
    assert every == [(1, 2), (3, 5), (6, 9)]
    assert sorted(allocator.gaps_below(10**6, 2 * BLOCK)) == [
        (3 * BLOCK, 5 * BLOCK),
        (6 * BLOCK, 9 * BLOCK),
    ]
    assert list(allocator.gaps_below(8 * BLOCK, 2 * BLOCK + 1)) == []
    assert list(allocator.gaps_below(8 * BLOCK, 2 * BLOCK)) == [
        (3 * BLOCK, 5 * BLOCK),
        (6 * BLOCK, 8 * BLOCK),
    ]
    assert allocator.gap_before(9 * BLOCK) == 3 * BLOCK
    assert allocator.gap_before(8 * BLOCK) == 0


def test_below_an_end_what_lies_behind_stays_free_and_as_it_was() -> None:
    allocator = fragmented()
    assert allocator.allocate_many([2 * BLOCK, BLOCK], 8 * BLOCK) == [6 * BLOCK, BLOCK]
    allocator.check()
    with pytest.raises(CapacityError):
        allocator.allocate_many([2 * BLOCK + 1], 8 * BLOCK)
    allocator.check()
    assert allocator.allocate_many([2 * BLOCK], 8 * BLOCK) == [3 * BLOCK]
    assert dict(allocator.gaps) == {8 * BLOCK: BLOCK}


@pytest.mark.parametrize("end", [None, 8 * BLOCK])
def test_an_interrupt_anywhere_leaves_books_that_agree(end: int | None) -> None:
    ours: list[Allocator] = []

    def change(at: int) -> None:
        ours[0].allocate_many([BLOCK, 2 * BLOCK], end)
        ours[0].free(0)
        ours[0].allocate(BLOCK)
        ours[0].free(5 * BLOCK)

    def check(at: int) -> None:
        ours[0].check()

    assert (
        interrupted_everywhere(
            lambda at: ours.__setitem__(slice(None), [fragmented()]), change, check
        )
        > 30
    )


@given(
    st.lists(
        st.tuples(st.integers(6, 24), st.sampled_from([-1, 0, 1, BLOCK, BLOCK + 1, 3 * BLOCK])),
        max_size=6,
    ),
    st.integers(0, 9),
)
def test_extents_that_cannot_be_together_are_found(places: list[tuple[int, int]], odd: int) -> None:
    extents = [(first * BLOCK, nbytes) for first, nbytes in places]
    if odd < len(extents):
        extents[odd] = (extents[odd][0] + 1, extents[odd][1])
    start, end = 8 * BLOCK, 24 * BLOCK
    ends = [offset + align_up(nbytes, BLOCK) for offset, nbytes in extents]
    expected = set()
    for i, (offset, nbytes) in enumerate(extents):
        if nbytes < 1 or offset % BLOCK or offset < start or ends[i] > end:
            expected.add(i)
        for j, (other, size) in enumerate(extents):
            if i != j and min(nbytes, size) > 0 and other < ends[i] and offset < ends[j]:
                expected.add(i)
    assert damaged_extents(extents, BLOCK, start, end) == expected


def test_a_hundred_thousand_extents_survive_churn_in_modest_memory() -> None:
    chance = random.Random(7)
    tracemalloc.start()
    allocator = Allocator(1 << 40, 4096)
    extents = [allocator.allocate(chance.randrange(1, 1 << 20)) for _ in range(100_000)]
    for _ in range(50_000):
        place = chance.randrange(len(extents))
        allocator.free(extents[place])
        extents[place] = allocator.allocate(chance.randrange(1, 1 << 20))
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    allocator.check()
    assert nbytes < 400 * len(extents)

    reopened = Allocator(1 << 40, 4096)
    reopened.reserve_all((offset, allocator.extent_nbytes(offset)) for offset in extents)
    reopened.check()
    assert reopened.free_nbytes == allocator.free_nbytes
    assert reopened.largest_free_nbytes == allocator.largest_free_nbytes
