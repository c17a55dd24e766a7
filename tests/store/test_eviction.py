"""What a full store evicts: old neighbours, about as much as is asked, and nothing in vain."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spdk_kv
from spdk_kv.errors import CapacityError
from spdk_kv.index import BlobRecord
from spdk_kv.placement import Allocator
from spdk_kv.store.extents import BLOCK_NBYTES, ExtentTable
from spdk_kv.store.records import Records, blob_table
from spdk_kv.store.windows import Window, Windows, _apart
from spdk_kv.units import align_up
from store.helpers import check_books, folder_fixture, noise, open_store
from support import blockdev
from support.rounds import examples, rounds

folder = folder_fixture

KIB, MIB = 1 << 10, 1 << 20
BUFFER = np.zeros(16 * MIB, np.uint8)


def evicted_by(store: spdk_kv.KVStore, key: str, nbytes: int) -> int:
    """Puts a blob of ``nbytes``; the bytes of the blobs that went for it."""
    records = store.catalog.records
    before = dict(records.blobs)
    store.put(key, BUFFER[:nbytes])
    gone = before.keys() - set(records.blobs)
    return sum(align_up(before[key].nbytes, BLOCK_NBYTES) for key in gone)


def fill_to(store: spdk_kv.KVStore, share: float, size) -> int:
    """Puts blobs of ``size()`` bytes until ``share`` of the store is used; how many."""
    count = 0
    allocator = store.catalog.records.extents.allocator
    while allocator.used_nbytes < share * allocator.capacity_nbytes:
        store.put(f"first {count}", BUFFER[: size()])
        count += 1
    return count


def test_random_puts_evict_what_they_need_and_the_store_stays_full():
    chance = random.Random(1)
    sizes = [4 * KIB, 64 * KIB, 256 * KIB, MIB, 8 * MIB]

    def size() -> int:
        return chance.choices(sizes, [40, 30, 20, 9, 1])[0]

    with open_store("null://", capacity="128 MiB") as store:
        fill_to(store, 0.95, size)
        allocator = store.catalog.records.extents.allocator
        asked = evicted = large = evicted_for_large = 0
        for turn in range(rounds(2000, 20_000)):
            nbytes = size()
            gone = evicted_by(store, str(turn), nbytes)
            asked += nbytes
            evicted += gone
            if nbytes == 8 * MIB:  # larger than usual: nothing is evicted ahead
                large += nbytes
                evicted_for_large += gone
            assert allocator.used_nbytes > 0.85 * allocator.capacity_nbytes
        assert evicted <= 1.1 * asked
        assert evicted_for_large <= 1.5 * large
        allocator.check()


@pytest.mark.parametrize(("eviction", "least", "most"), [("slru", 40, 40), ("lru", 0, 0)])
def test_what_is_used_again_outlives_a_flood_of_what_comes_once(eviction, least, most):
    with open_store("null://", capacity="64 MiB", eviction=eviction) as store:
        hot = [f"hot {number}" for number in range(40)]
        for key in hot:
            store.put(key, BUFFER[: 64 * KIB])
            store.get(key, as_numpy=True)
        for number in range(4 * 1024):  # four times the store
            store.put(str(number), BUFFER[: 64 * KIB])
        assert least <= sum(key in store for key in hot) <= most
        # What nobody wants any more goes all the same.
        for number in range(32 * 1024):
            store.put(str(number), BUFFER[: 64 * KIB])
        assert not any(key in store for key in hot)


def test_what_was_evicted_and_comes_back_stays():
    with open_store("null://", capacity="64 MiB") as store:
        store.put("back", BUFFER[: 64 * KIB])
        numbers = iter(range(10_000))
        while "back" in store:
            store.put(str(next(numbers)), BUFFER[: 64 * KIB])
        store.put("back", BUFFER[: 64 * KIB])
        for _ in range(2 * 1024):
            store.put(str(next(numbers)), BUFFER[: 64 * KIB])
        assert "back" in store


def test_a_few_puts_into_a_store_just_opened_evict_no_more_than_they_need(folder):
    with open_store(folder, capacity="64 MiB") as store:
        fill_to(store, 1, lambda: 64 * KIB)
    with open_store(folder, capacity="64 MiB") as store:
        for turn in range(10):
            evicted_by(store, str(turn), 64 * KIB)
        assert store.stats()["evictions"] <= 15


@pytest.mark.parametrize("extents", [2, 16])
def test_a_sequence_evicts_about_its_own_size(extents):
    chance = random.Random(2)
    sizes = [4 * KIB, 16 * KIB, 64 * KIB]
    with open_store("null://", capacity="64 MiB") as store:
        fill_to(store, 1, lambda: chance.choice(sizes))
        for _ in range(2000):  # of all ages, in all places
            key = f"first {chance.randrange(2000)}"
            if key in store:
                store.get(key)
        before = store.catalog.records.blob_nbytes
        shape = spdk_kv.KVShape(extents // 2, 1, 64, torch.float16, 16 * MIB // extents // 128)
        store.sequence("s", shape)
        assert before - store.catalog.records.blob_nbytes <= 1.5 * 16 * MIB
        check_books(store)


def test_a_window_of_old_neighbours_goes_rather_than_one_with_a_young_blob():
    with open_store("ram://", capacity="16 MiB") as store:
        for number in range(16):
            store.put(f"{number:02}", BUFFER[:MIB])
        for number in (0, 1, 2, 5, 9, 10, 13, 14):  # only 6 to 8 are three old ones in a row
            store.get(f"{number:02}")
        store.put("three", BUFFER[: 3 * MIB])
        assert [f"{n:02}" for n in range(16) if f"{n:02}" not in store] == ["06", "07", "08"]


def test_one_large_blob_makes_room_for_several_extents():
    with open_store("ram://", capacity="4 MiB") as store:
        for key in "abcd":
            store.put(key, BUFFER[:MIB])
        store.put_many({str(i): BUFFER[: 256 * KIB] for i in range(4)})
        assert store.keys() == [*"bcd0123"]


def test_what_a_store_without_index_replaces_is_free_at_once():
    with open_store("ram://", capacity="4 MiB") as store:
        for _ in range(3):
            store.put("a", BUFFER[: 2 * MIB])
            assert store.stats()["used_nbytes"] == 2 * MIB


# -- what is impossible ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["put", "sequence"])
def test_what_the_filesystem_cannot_hold_is_refused_and_evicts_nothing(tmp_path, what):
    with (
        blockdev.ext4(tmp_path, 48 * MIB) as disk,
        open_store(disk / "kv", capacity="1 GiB") as store,
    ):
        for number in range(10):
            store.put(str(number), noise(MIB, number))
        large = np.zeros(100 * MIB, np.uint8)
        shape = spdk_kv.KVShape(4, 2, 64, torch.float16, 50_000)
        calls = {"put": (store.put, large), "sequence": (store.sequence, shape)}
        call, argument = calls[what]
        with pytest.raises(CapacityError, match="filesystem is full; nothing was evicted"):
            call("large", argument)
        assert len(store) == 10
        assert store.stats()["evictions"] == 0
        # What the disk can hold, all of it, is possible.
        store.put("all", BUFFER[: 16 * MIB])
        check_books(store)


def test_a_full_disk_s_refusal_says_what_is_lacking_and_what_can_be_done():
    with open_store("ram://", capacity="8 MiB") as store:
        held = store.sequence("s", spdk_kv.KVShape(1, 1, 64, torch.float16, 16384))  # 4 MiB
        store.put("blob", BUFFER[:MIB])
        with pytest.raises(CapacityError) as refused:
            store.put("large", BUFFER[: 5 * MIB])
        said = str(refused.value)
        assert "nothing was evicted, since without any blob and any sequence that nobody" in said
        assert "there would be 4.0 MiB" in said
        assert "4.0 MiB belong to sequences, of which those stay that are in use" in said
        assert "blob" in store
        assert not held.deleted


def test_room_that_is_cut_up_by_sequences_is_refused_by_its_largest_piece():
    with open_store("ram://", capacity="8 MiB") as store:
        shape = spdk_kv.KVShape(1, 1, 64, torch.float16, 4096)  # 1 MiB
        held = []
        for number in range(4):
            store.put(str(number), BUFFER[:MIB])
            held.append(store.sequence(str(number), shape))
        held[1].delete()
        with pytest.raises(CapacityError, match=r"there would be 3\.0 MiB in one piece"):
            store.put("large", BUFFER[: 3 * MIB + 1])
        assert store.stats()["evictions"] == 0
        store.put("large", BUFFER[: 3 * MIB])
        assert store.stats()["evictions"] == 2


def test_the_cheapest_window_is_found_behind_many_dear_ones():
    with open_store("ram://", capacity="32 MiB") as store:
        for number in range(32):
            store.put(f"{number:02}", BUFFER[:MIB])
        # Eight pairs used longest ago, each with young neighbours, and then three in a row.
        for number in [*range(27, 32), *range(2, 24, 3)] * 5:
            store.get(f"{number:02}")
        store.put("three", BUFFER[: 3 * MIB])
        assert [f"{n:02}" for n in range(32) if f"{n:02}" not in store] == ["24", "25", "26"]


# -- any arrangement ------------------------------------------------------------------------------

NBLOCKS = 40


def arranged(kinds: list[str], sizes: list[int], order: random.Random) -> Records:
    """Records over a drive of 40 blocks, laid out from its beginning: blobs, gaps, and extents of
    others ("fixed") or that are being read ("pinned")."""
    allocator = Allocator(NBLOCKS * BLOCK_NBYTES, BLOCK_NBYTES)
    blobs, fixed, pinned, at = [], [], [], 0
    for kind, size in zip(kinds, sizes, strict=False):
        size = min(size, NBLOCKS - at)
        extent = (at * BLOCK_NBYTES, size * BLOCK_NBYTES)
        at += size
        if size and kind == "fixed":
            fixed.append(extent)
        elif size and kind != "gap":
            blobs.append(BlobRecord(*extent, "uint8", (size,), 0))
            pinned += [extent[0]] * (kind == "pinned")
    allocator.reserve_all([*fixed, *((blob.offset, blob.nbytes) for blob in blobs)])
    order.shuffle(blobs)
    extents = ExtentTable(allocator, lasting=False)
    extents.pin(pinned)
    return Records(blob_table((str(blob.offset), blob) for blob in blobs), {}, extents)


def test_the_largest_extent_is_dealt_with_first_and_gaps_are_used():
    kinds = ["gap", "fixed", "blob", "fixed", "blob", "fixed", "blob", "fixed", "pinned", "gap"]
    records = arranged(kinds, [1, 1, 4, 1, 1, 1, 2, 1, 3, 25], random.Random(0))
    fixed = 40 * BLOCK_NBYTES  # a store with no other gap
    records.extents.allocator.reserve_all([(15 * BLOCK_NBYTES, 25 * BLOCK_NBYTES)])
    windows = Windows(records, fixed)
    assert windows.largest() == 4 * BLOCK_NBYTES
    for order in ([1, 4], [4, 1]):
        chosen = windows.choose([blocks * BLOCK_NBYTES for blocks in order], 0)
        assert chosen == [2 * BLOCK_NBYTES]
    assert windows.choose([5 * BLOCK_NBYTES], 0) is None


def test_windows_are_apart_and_as_many_as_are_asked_and_no_more():
    first, over, behind, last = (
        Window(1.0, start, start + 4, [start]) for start in (8, 10, 12, 16)
    )
    before, all_of_them = Window(1.0, 4, 9, [4]), [first, over, behind, last]
    assert _apart(all_of_them, 4, 1, 0, []) == [first]
    assert _apart(all_of_them, 4, 2, 0, []) == [first, behind]
    assert _apart(all_of_them, 2, 2, 0, []) == [first], "one window may hold two"
    assert _apart(all_of_them, 4, 3, 0, []) == [first, behind, last]
    assert _apart(all_of_them, 4, 4, 0, []) is None
    assert _apart(all_of_them, 4, 1, 0, [first]) == [behind]
    assert _apart(all_of_them, 4, 1, 0, [first, before]) == [behind]
    assert _apart([before, *all_of_them], 4, 2, 0, [last]) == [before, over]
    assert _apart([first, last], 4, 1, 3, []) == [first]
    assert _apart([first, last], 4, 1, 4, []) == [first, last]


@settings(max_examples=examples(300))
@given(
    kinds=st.lists(st.sampled_from(["blob", "blob", "blob", "gap", "fixed", "pinned"]), min_size=8),
    sizes=st.lists(st.integers(1, 6), min_size=8, max_size=40),
    wanted=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    end=st.integers(20, NBLOCKS),
    seed=st.integers(0, 99),
    ahead=st.sampled_from([0, 0, 8]),
)
def test_what_is_chosen_makes_room_and_none_means_impossible(
    kinds, sizes, wanted, end, seed, ahead
):
    records = arranged(kinds, sizes, random.Random(seed))
    allocator = records.extents.allocator
    limit = max([end * BLOCK_NBYTES, *(at + n for at, n in allocator.live.items())])
    asked = [blocks * BLOCK_NBYTES for blocks in wanted]
    try:
        allocator.allocate_many(asked, limit)
        return  # there was room
    except CapacityError:
        pass
    windows = Windows(records, limit)
    victims = windows.choose(asked, ahead * BLOCK_NBYTES)
    if victims is None:
        assert len(asked) > 1 or windows.largest() < asked[0]
        victims = [at for at in records.residents.offsets() if not records.extents.is_pinned(at)]
        records.evict(victims)
        if len(asked) == 1:
            with pytest.raises(CapacityError):
                allocator.allocate_many(asked, limit)
        return
    assert len(set(victims)) == len(victims)
    assert not any(map(records.extents.is_pinned, victims))
    records.evict(victims)
    if len(asked) == 1:
        (offset,) = allocator.allocate_many(asked, limit)
        assert offset + asked[0] <= limit
    allocator.check()
