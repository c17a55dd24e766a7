"""What is packed behaves as the mappings do that it stands for."""

from __future__ import annotations

import gc
import random
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv._native.table import (
    BlobTable,
    ExtentMap,
    RowReader,
    kinds_of,
    packed,
    unpack_into,
)
from support.rounds import rounds

BLOCK, START = 4096, 1 << 20


class Record(NamedTuple):
    """As the store's own, to which the table has no way."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    crc: int


def record(number: int, nbytes: int = 5000, dtype: str = "uint8") -> Record:
    return Record(START + number * 2 * BLOCK, nbytes, dtype, (nbytes,), number)


@contextmanager
def collected_amid(act: Callable[[], object]) -> Iterator[None]:
    """Has ``act`` run in garbage collections, as a finalizer would: wherever an object is made,
    where Python collects at once (before 3.12)."""

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            act()

    thresholds = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)


# -- blobs ----------------------------------------------------------------------------------------


class Model:
    """What a table is to do, by a dictionary in order."""

    def __init__(self, once_weight: int) -> None:
        self.blobs: OrderedDict[str, Record] = OrderedDict()
        self.used_at: dict[str, int] = {}
        self.used_again: set[str] = set()
        self.once_weight = once_weight
        self.now = 0

    def use(self, key: str) -> None:
        self.blobs.move_to_end(key)
        self.now += 1
        self.used_at[key] = self.now
        self.used_again.add(key)

    def put(self, key: str, new: Record) -> Record | None:
        former = self.blobs.get(key)
        self.blobs[key] = new
        self.use(key)
        if former is None:
            self.used_again.discard(key)
        return former

    def age(self, key: str) -> int:
        """As eviction sees it."""
        age = self.now - self.used_at[key]
        return age if key in self.used_again else age * self.once_weight

    def oldest(self) -> list[int]:
        keys = sorted(self.blobs, key=lambda key: (-self.age(key), key in self.used_again))
        return [self.blobs[key].offset for key in keys if self.blobs[key].nbytes]


def check(table: BlobTable[Record], model: Model, keys: list[str]) -> None:
    assert table.items() == list(model.blobs.items())
    assert list(table) == table.keys() == list(model.blobs)
    assert list(reversed(table)) == list(model.blobs)[::-1]
    assert table.values() == list(model.blobs.values())
    assert len(table) == len(model.blobs)
    filled = [each for each in model.blobs.values() if each.nbytes]
    assert table.offsets() == [each.offset for each in filled]
    assert list(table.oldest()) == model.oldest()
    assert table.footprint_nbytes == sum(-(-each.nbytes // BLOCK) * BLOCK for each in filled)
    assert table.end == max((each.offset + each.nbytes for each in filled), default=0)
    assert table.now == model.now
    for key in keys:
        assert (key in table) == (key in model.blobs)
        assert table.get(key) == model.blobs.get(key)
    for key, each in model.blobs.items():
        if each.nbytes:
            assert table.used_at(each.offset) == model.now - model.age(key)
            assert table.key_at(each.offset) == key


@settings(max_examples=60)
@given(st.integers(0, 1 << 30), st.integers(1, 400), st.sampled_from([1, 8]))
def test_a_table_does_what_a_dictionary_in_order_does(
    seed: int, steps: int, once_weight: int
) -> None:
    chance = random.Random(seed)
    keys = [chance.choice(["k", "kä", "日本", "\ud800", ""]) + "x" * chance.choice([0, 1, 7, 90])
            + str(number) for number in range(40)]  # fmt: skip
    keys.append("y" * 9000)
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    table.once_weight = once_weight
    model = Model(once_weight)
    for step in range(steps):
        key, choice = chance.choice(keys), chance.random()
        there = list(model.blobs)
        if choice < 0.5:
            nbytes = chance.choice([0, 1, BLOCK, BLOCK + 1, 3 * BLOCK])
            new = record(step, nbytes, chance.choice(["uint8", "float16"]))
            if not nbytes:
                new = new._replace(offset=0)
            assert table.put(key, new) == model.put(key, new)
        elif choice < 0.65:
            assert table.pop(key) == model.blobs.pop(key, None)
        elif choice < 0.75 and there:
            key = chance.choice(there)
            former = model.blobs[key]
            if former.nbytes:
                new = former._replace(offset=START + (steps + step) * 2 * BLOCK)
                model.blobs[key] = new
                assert table.replace(key, new) == former
        else:
            wanted = [chance.choice(there) for _ in range(chance.randrange(4) if there else 0)]
            assert table.use([*wanted, "nobody's"]) is None
            assert table.use(wanted) == [model.blobs[each] for each in wanted]
            for each in wanted:
                model.use(each)
        if step % 20 == 0:
            check(table, model, keys)
    check(table, model, keys)
    for key in list(model.blobs):
        assert table.pop(key) == model.blobs.pop(key)
    check(table, model, keys)


def test_what_was_evicted_unused_counts_as_used_when_it_is_back() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    table.once_weight = 8
    for key, evicted in (("evicted", True), ("deleted", False)):
        table.put(key, record(1))
        table.pop(key, evicted)
        table.put(key, record(1))
        assert table.used_at(record(1).offset) == table.now
        table.tick()
        assert table.used_at(record(1).offset) == table.now - (1 if evicted else 8)
        table.pop(key)


def test_what_is_remembered_of_evictions_grows_with_the_blobs() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    table.once_weight = 8
    count = 20_000
    for number in range(count):
        table.put(str(number), record(number))
    for number in range(count):
        table.pop(str(number), True)
    for number in range(count):
        table.put(str(number), record(number))
    table.tick()
    now = table.now
    back = sum(
        table.used_at(record(number).offset) == number + count + 1 for number in range(count)
    )
    assert now == 2 * count + 1
    # One takes the place of another by chance.
    assert count // 2 < back < count


@pytest.mark.parametrize("key", ["key", "\ud800"], ids=["plain", "surrogate"])
def test_a_touch_is_a_use_of_those_that_are_there(key: str) -> None:
    tables: list[BlobTable[Record]] = [BlobTable(Record, BLOCK), BlobTable(Record, BLOCK)]
    keys = [f"{key}{number}" for number in range(9)]
    for table in tables:
        for number, each in enumerate(keys):
            table.put(each, record(number))
    before = tables[0].changes
    assert tables[0].touch(["none", f"{key}9", "\ud801"]) == 0
    assert tables[0].changes == before
    assert tables[0].touch([keys[5], "none", keys[2], keys[5]]) == 3
    tables[1].use([keys[5], keys[2], keys[5]])
    assert tables[0].changes > before
    for number in range(9):
        place = START + number * 2 * BLOCK
        assert tables[0].used_at(place) == tables[1].used_at(place)
    assert tables[0].keys() == tables[1].keys() == [*(keys[n] for n in (0, 1, 3, 4, 6, 7, 8, 2, 5))]


READS: list[Callable[[BlobTable[Record], list[str]], object]] = [
    lambda table, keys: table.items(),
    lambda table, keys: table.keys(),
    lambda table, keys: list(table),
    lambda table, keys: table.get(keys[7]),
    lambda table, keys: table.used_since(0, 100),
]


@pytest.mark.parametrize("key", ["key", "\ud800"], ids=["plain", "surrogate"])
def test_a_finalizer_changes_a_table_while_objects_are_made(key: str) -> None:
    keys = [f"{key}{number}" for number in range(50)]
    table: BlobTable[Record] = BlobTable(Record, BLOCK)

    def fill() -> None:
        for number, each in enumerate(keys):
            table.put(each, record(number, number + 1))

    def change() -> None:
        if table.changes == before:
            return  # nothing has been found yet
        for each in list(table):
            table.pop(each)
        for number in range(100):
            table.put("x" * (8 * number), record(100 + number, 7 * number, "float16"))

    fill()
    expected, before = table.values(), table.changes
    with collected_amid(change):
        assert table.use(keys) == expected
    for read in READS:
        fill()
        before = -1
        with collected_amid(change), suppress(RuntimeError):
            read(table, keys)


def test_what_is_not_there_is_none_or_an_error() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    assert table.get("a") is None
    assert table.get("a", 7) == 7
    assert table.pop("a") is None
    assert 5 not in table
    for wrong in (lambda: table["a"], lambda: table.replace("a", record(1))):
        with pytest.raises(KeyError):
            wrong()
    with pytest.raises(TypeError, match="str"):
        table.put(b"a", record(1))
    with pytest.raises(OverflowError):
        table.put("a", record(1)._replace(offset=-1))
    with pytest.raises(OverflowError):
        table.put("a", record(1)._replace(crc=1 << 32))
    assert len(table) == 0


def test_who_iterates_is_told_of_changes() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    for number in range(3):
        table.put(str(number), record(number))
    for iterator in (iter(table), reversed(table), table.oldest()):
        next(iterator)
        table.use(["1"])
        with pytest.raises(RuntimeError, match="changed"):
            next(iterator)


class Collections:
    """Runs ``change`` amid the garbage collection with this number: as a finalizer might."""

    def __init__(self, number: int, change: Callable[[], object]) -> None:
        self.left = number
        self.change = change

    def __call__(self, phase: str, info: object) -> None:
        self.left -= phase == "start"
        if self.left == 0:
            self.left = -1
            self.change()

    def __enter__(self) -> None:
        self.thresholds = gc.get_threshold()
        gc.callbacks.append(self)
        gc.set_threshold(1)

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self.thresholds)
        gc.callbacks.remove(self)


@pytest.mark.parametrize("keys", [["a", "b", "c", "d"], ["\ud800", "\ud801", "\ud802", "\ud803"]])
def test_what_a_finalizer_changes_comes_before_a_use_or_after_it(keys: list[str]) -> None:
    outcomes = []
    for number in range(1, 40):
        table: BlobTable[Record] = BlobTable(Record, BLOCK)
        for place, key in enumerate(keys):
            table.put(key, record(place, dtype=f"of {place}"))
        before = [table[key] for key in keys]
        others = [(f"{place}" * len(keys[0].encode("utf-8", "surrogatepass")), record(20 + place))
                  for place in range(4)]  # fmt: skip

        def change(table: BlobTable[Record] = table, others: object = others) -> None:
            for key in keys[1:]:
                table.pop(key)
            for key, other in others:  # type: ignore[attr-defined]
                table.put(key, other)

        with Collections(number, change):
            found = table.use(keys)
        assert found is None or found == before, number
        outcomes.append(found is None)
        rest = [key for key in keys if key in table]
        assert sorted(table) == sorted([*rest, *(key for key, _ in others if key in table)])
    assert not all(outcomes)


def test_keys_by_their_beginning() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    for number, key in enumerate(["ä", "äb", "a", "", "äbc"]):
        table.put(key, record(number))
    assert table.keys("ä") == ["ä", "äb", "äbc"]
    assert table.keys("") == ["ä", "äb", "a", "", "äbc"]
    assert table.keys("äbcd") == []


def test_the_extents_of_blobs_are_reserved_or_refused() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    for number in range(5):
        table.put(str(number), record(number))
    table.put("empty", Record(0, 0, "uint8", (0,), 0))
    extents = ExtentMap(START, START + 100 * BLOCK, BLOCK)
    assert table.reserve(extents)
    assert dict(extents.items()) == {record(number).offset: 2 * BLOCK for number in range(5)}
    assert not table.reserve(extents)  # each is there already
    for wrong in (START - BLOCK, START + 1, START + 99 * BLOCK, 1 << 60):
        table.put("0", record(0)._replace(offset=wrong))
        assert not table.reserve(ExtentMap(START, START + 100 * BLOCK, BLOCK))


def test_a_table_comes_back_from_its_bytes_with_order_and_ages() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    for number in range(500):
        table.put(f"{number}" * (number % 9), record(number, number % 70 * 100))
    table.use([key for number, key in enumerate(table) if number % 3 == 0])
    table.pop("1")
    for section_nbytes in (1, 1000, 1 << 20):
        sections = list(packed(table, section_nbytes, table.changes))
        again: BlobTable[Record] = BlobTable(Record, BLOCK)
        again.expect(len(table))
        for section in sections:
            unpack_into(again, section, kinds_of(table))
        assert again.items() == table.items()
        for each in (table, again):
            each.once_weight = 8
        assert list(again.oldest()) == list(table.oldest())
        assert again.footprint_nbytes == table.footprint_nbytes
        for each in (table, again):
            each.once_weight = 1
    again.put("more", record(7))
    assert again.pop("more") == record(7)


def test_bytes_that_are_no_table_are_refused() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    table.put("a", record(1))
    table.put("b", record(2))
    (good,) = packed(table, 1000, table.changes)
    kinds = kinds_of(table)
    for wrong, why in ((good[:-1], "key"), (good[:25], "entry"), (good * 2, "twice")):
        with pytest.raises(ValueError, match=why):
            unpack_into(BlobTable(Record, BLOCK), wrong, kinds)
    with pytest.raises(ValueError, match="utf-8"):
        unpack_into(BlobTable(Record, BLOCK), good[:-1] + b"\xff", kinds)
    for missing in ([], [None]):
        with pytest.raises(ValueError, match="kind"):
            unpack_into(BlobTable(Record, BLOCK), good, missing)
    with pytest.raises(RuntimeError, match="changed"):
        next(packed(table, 1000, table.changes - 1))


def row(number: int, key: bytes, seed: int = 7) -> tuple[int, bytes, bytes]:
    body = struct.pack("<IqI", len(key), START + number * 2 * BLOCK, number) + b"kind"
    return number, key, body + struct.pack("<I", zlib.crc32(body, zlib.crc32(key, seed)))


@pytest.mark.parametrize("key_nbytes", [*range(20), 1000])
def test_rows_are_read_as_put_or_refused(key_nbytes: int) -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    reader = RowReader(table, 7, lambda kind: (5000, "uint8", (len(kind), 1250)))
    keys = [f"{number:02}{chr(65 + number % 50) * key_nbytes}".encode() for number in range(80)]
    rows = [row(number, key) for number, key in enumerate(keys, 1)]
    reader.add(rows[:50])
    reader.add(rows[50:])
    assert table.items() == [
        (key.decode(), record(number)._replace(shape=(4, 1250)))
        for number, key in enumerate(keys, 1)
    ]
    reader.check_keys([(key, number) for number, key, _ in rows])
    assert reader.agree()
    assert reader.count == 80
    good = rows[0][2]
    for number, key, content, why in [
        (1, keys[1], good, "checksum"),
        (1, keys[0], good[:-1], "checksum"),
        (1, keys[0], good[:19], "short"),
        (1, keys[0], b"\0" + good, "checksum"),
        (1, keys[0], "text", "bytes"),
        (1, None, good, "bytes"),
        (1, keys[0], good, "twice"),
        (*row(1, b"\xff" * 9), "utf-8"),
    ]:
        with pytest.raises(ValueError, match=why):
            reader.add([(number, key, content)])  # type: ignore[list-item]
        assert reader.row == 1


def test_an_index_of_keys_is_compared_in_any_order_of_the_rows() -> None:
    rows = [(3, b"a", b""), (1, b"aa", b""), (2, b"b", b"")]
    keys = [(key, number) for number, key, _ in rows]

    def reader() -> RowReader:
        found = RowReader(None, 7, lambda kind: (0, "", ()))
        found.add(rows[:1])
        found.add(rows[1:])
        return found

    same = reader()
    same.check_keys(keys[:2])
    same.check_keys(keys[2:])
    assert same.agree()
    for others in (keys[:2], [*keys, (b"c", 4)], [(b"a", 3), (b"aa", 2), (b"b", 1)], []):
        other = reader()
        other.check_keys(others)
        assert not other.agree()
    for wrong in (keys[1::-1], [keys[0], keys[0]], [(b"aa", 1), (b"a", 3)]):
        with pytest.raises(ValueError, match="order"):
            reader().check_keys(wrong)
        other = reader()
        other.check_keys(wrong[:1])
        with pytest.raises(ValueError, match="order"):
            other.check_keys(wrong[1:])


def test_who_was_used_since_is_told_in_order() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    for number in range(6):
        table.put(str(number), record(number, number * 100))
    then = table.now
    table.use(["3", "0"])
    table.put("new", record(9))
    assert table.used_since(then, 10) == ["3", "0", "new"]
    assert table.used_since(then, 2) == ["0", "new"]
    assert table.used_since(-1, 100) == list(table)
    assert table.used_since(table.now, 10) == []


def test_memory_comes_back_for_other_entries() -> None:
    table: BlobTable[Record] = BlobTable(Record, BLOCK)
    for number in range(rounds(20_000, 200_000)):
        table.put(f"{number % 7}" * (number % 50), record(number % 1000, 1 + number % 100))
        if number % 3 == 0:
            table.pop(next(iter(table)))
    model = OrderedDict(table.items())
    assert len(model) == len(table) > 10


# -- extents --------------------------------------------------------------------------------------

NBLOCKS = 200_000


@settings(max_examples=60)
@given(st.integers(0, 1 << 30))
def test_a_map_of_extents_does_what_a_dictionary_does(seed: int) -> None:
    chance = random.Random(seed)
    extents = ExtentMap(START, START + NBLOCKS * BLOCK, BLOCK)
    model: dict[int, int] = {}
    at = 0
    while at < NBLOCKS - 1:
        at += chance.choice([0, 0, 1, 63, 64, 65, 5000, 40_000])
        size = min(chance.choice([1, 1, 2, 63, 64, 65, 128, 33_000]), NBLOCKS - at)
        if size > 0:
            extents[START + at * BLOCK] = size * BLOCK
            model[START + at * BLOCK] = size * BLOCK
        at += size
    for offset in chance.sample(list(model), len(model) // 3):
        assert extents.pop(offset) == model.pop(offset)
        assert offset not in extents
    assert list(extents.items()) == sorted(model.items())
    assert list(extents) == list(extents.keys()) == sorted(model)
    assert list(extents.values()) == [model[offset] for offset in sorted(model)]
    assert len(extents) == len(model)
    assert extents.total() == sum(model.values())
    assert extents.check()
    tiles = sorted([*model.items(), *extents.gaps()])
    assert sum(nbytes for _, nbytes in tiles) == NBLOCKS * BLOCK
    for (offset, nbytes), (following, _) in pairwise(tiles):
        assert offset + nbytes == following
    for offset in (0, START - BLOCK, START + 1, START + NBLOCKS * BLOCK, 1 << 70):
        assert offset not in extents
        assert extents.get(offset) is None
        assert extents.get(offset, 3) == 3
        for wrong in (lambda at=offset: extents[at], lambda at=offset: extents.pop(at)):
            with pytest.raises(KeyError):
                wrong()


def test_what_is_no_extent_is_refused() -> None:
    extents = ExtentMap(START, START + 10 * BLOCK, BLOCK)
    extents[START + 4 * BLOCK] = 2 * BLOCK
    for offset, nbytes in ((START, 0), (START, BLOCK + 1), (START + 1, BLOCK), (0, BLOCK),
                           (START + 9 * BLOCK, 2 * BLOCK), (START + 10 * BLOCK, BLOCK),
                           (START + 4 * BLOCK, BLOCK), (START, 6 * BLOCK)):  # fmt: skip
        with pytest.raises(ValueError, match="offset"):
            extents[offset] = nbytes
    assert dict(extents.items()) == {START + 4 * BLOCK: 2 * BLOCK}
    assert extents.add_run(START, [BLOCK, 2 * BLOCK]) == [START, START + BLOCK]
    before = dict(extents.items())
    for offset, sizes in (
        (START + 6 * BLOCK, [2 * BLOCK, 3 * BLOCK]),
        (START + 6 * BLOCK, [BLOCK, 0]),
        (START + 3 * BLOCK, [BLOCK, BLOCK]),  # where one begins
        (START + 6 * BLOCK, [BLOCK, (1 << 64) - BLOCK]),  # of which the sum begins anew
    ):
        with pytest.raises(ValueError, match="offset"):
            extents.add_run(offset, sizes)
        assert dict(extents.items()) == before
    assert extents.check()


@pytest.mark.parametrize("collections", [1, 2, 3, 20, 60])
def test_a_finalizer_changes_a_map_while_extents_are_taken_out(collections: int) -> None:
    extents = ExtentMap(START, START + NBLOCKS * BLOCK, BLOCK)
    # More than Python keeps tuples for, which it gives out without a collection.
    offsets = [START, *(START + (50_000 + 2 * number) * BLOCK for number in range(2100))]
    for offset in offsets:
        extents[offset] = BLOCK
    left = [collections]

    def change() -> None:
        left[0] -= 1
        if left[0] == 0 and START in extents:
            extents.pop(START)

    with collected_amid(change):
        try:
            taken = extents.take(offsets)
        except KeyError:
            taken = []
    if taken:
        assert taken == [(offset, BLOCK) for offset in offsets]
    assert len(extents) == len(list(extents)) == (0 if taken else len(offsets) - 1)


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 10)), min_size=2, max_size=8),
)
def test_overlaps_are_found(places: list[tuple[int, int]]) -> None:
    extents = ExtentMap(0, 100 * BLOCK, BLOCK)
    blocks = [block for first, count in places for block in range(first, first + count)]
    try:
        for first, count in places:
            extents[first * BLOCK] = count * BLOCK
    except ValueError:
        assert len(set(blocks)) < len(blocks)
    else:
        assert extents.check() == (len(set(blocks)) == len(blocks))
