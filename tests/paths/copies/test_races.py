"""Two media when things happen in the worst order: copies that are late, holes that are late."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from link.helpers import link_up
from paths.copies.helpers import (
    CopyPlace,
    copied,
    damage,
    deleted,
    fully,
    on_disk_nbytes,
    place_fixture,
    waited,
)
from paths.helpers import (
    UNIT_NBYTES,
    UNITS,
    filled,
    paths,
    scans,
    set_available,
    units,
)
from spdk_kv._native.transfer import Transfer
from spdk_kv.errors import CorruptionError
from spdk_kv.store import KVStore

place = place_fixture


class Late:
    """While it lasts, copies are started but not written, and holes are kept unpunched."""

    def __init__(self, store: KVStore) -> None:
        engine: Any = store.paths.routes.cache
        self._engine, self._start, self._drop = engine, engine.start, engine.drop
        self._writes: list[Callable[[], Any]] = []
        self._punch = threading.Event()
        self._punch.set()
        self.punched: list[int] = []
        engine.start, engine.drop = self._started, self._dropped

    @property
    def started(self) -> int:
        """Copies that are not written yet."""
        return len(self._writes)

    def _started(self, *arguments: Any, **how: Any) -> None:
        self._writes.append(lambda: self._start(*arguments, **how))

    def _dropped(self, offset: int, nbytes: int) -> None:
        self._punch.wait()
        self.punched.append(offset)
        self._drop(offset, nbytes)

    def hold_holes(self) -> None:
        self._punch.clear()

    def punch(self) -> None:
        self._punch.set()

    def write(self) -> None:
        """Lets what was started go on, and everything from now on at once."""
        self._engine.start = self._start
        for write in self._writes:
            write()
        self._writes.clear()

    def end(self) -> None:
        self.write()
        self.punch()


@pytest.fixture
def store(place: CopyPlace) -> Iterator[KVStore]:
    options = {"capacity": "9 MiB"} if not place.lasting else {}
    with place.open(staging="64 MiB", **options) as opened:
        yield opened


@pytest.fixture
def late(store: KVStore) -> Iterator[Late]:
    held = Late(store)
    yield held
    held.end()


def nothing_was_wrong(store: KVStore) -> None:
    """No read of the copy had to be mended."""
    told = store.stats()["residency"]
    assert (told["taken_over_nbytes"], told["trouble"]) == (0, "")


def test_what_a_reader_makes_of_its_tensors_is_not_what_is_copied(
    store: KVStore, late: Late
) -> None:
    sequence, reference = filled(store, tokens=500)
    for layer in range(4):
        for part in sequence.read(layer):
            part.zero_()
    assert late.started == UNITS
    late.write()
    waited(store)
    assert min(copied(store)) > 0
    scans(sequence, reference, 2)
    nothing_was_wrong(store)


def test_a_copy_that_is_late_counts_for_what_was_not_truncated(store: KVStore, late: Late) -> None:
    sequence, reference = filled(store, tokens=1000)
    scans(sequence, reference)
    assert late.started == UNITS
    reference.truncate(sequence, 300)
    reference.append(sequence, 700)
    scans(sequence, reference)
    assert late.started == UNITS  # one of each unit at a time
    late.write()
    waited(store)
    assert 0 < max(unit.filled for unit in units(store)) <= 300 * 512
    scans(sequence, reference)
    fully(store, sequence, reference)
    scans(sequence, reference)
    nothing_was_wrong(store)


def test_a_copy_that_is_late_is_nothing_to_a_unit_that_left_and_came_back(
    store: KVStore, late: Late
) -> None:
    sequence, reference = filled(store, tokens=1000)
    scans(sequence, reference)
    set_available(store, 0)
    store.paths.decide()
    assert paths(store) == ["D"] * UNITS
    set_available(store, 1 << 30)
    store.paths.decide()
    assert paths(store) == ["C"] * UNITS
    scans(sequence, reference)
    assert late.started == UNITS
    assert late.punched == []  # or the late copy would lie there for good
    late.write()
    waited(store)
    assert len(late.punched) == UNITS
    assert copied(store) == [0] * UNITS
    assert on_disk_nbytes(store) < UNIT_NBYTES // 4
    fully(store, sequence, reference)
    scans(sequence, reference)
    nothing_was_wrong(store)


def test_nobody_is_copied_to_where_a_hole_is_still_to_be_punched(
    store: KVStore, late: Late
) -> None:
    late.write()
    sequence, reference = filled(store)
    fully(store, sequence, reference)
    late.hold_holes()
    before = [unit.extents for unit in units(store)]
    deleted(store, sequence)
    again, other = filled(store, "again")
    assert [unit.extents for unit in units(store)] == before
    scans(again, other, 3)
    assert copied(store) == [0] * UNITS
    late.punch()
    fully(store, again, other)
    assert copied(store) == [UNIT_NBYTES] * UNITS
    scans(again, other)
    nothing_was_wrong(store)


@pytest.mark.parametrize("ahead", [True, False])
def test_what_was_read_of_a_hole_is_not_used(store: KVStore, ahead: bool) -> None:
    sequence, reference = filled(store)
    sequence.read_ahead = False
    fully(store, sequence, reference)
    assert store.paths.routes.cache is not None
    for unit in units(store):
        for offset, nbytes in unit.extents:
            store.paths.routes.cache.drop(offset, nbytes)
    if ahead:
        sequence.prefetch(range(4))  # finds the holes
    set_available(store, 0)
    store.paths.decide()  # by which they are to be expected
    scans(sequence, reference)
    nothing_was_wrong(store)


def test_a_read_that_the_other_path_took_over_holds_its_memory_no_longer(store: KVStore) -> None:
    sequence, reference = filled(store)
    sequence.read_ahead = False
    fully(store, sequence, reference)
    before = store.staging.stats()["leased_nbytes"]
    damage(store)
    gc.collect()
    gc.disable()  # nothing is left to the collector, which may come late
    try:
        reference.check_layer(sequence, 0)
        assert store.stats()["residency"]["taken_over_nbytes"] == 2 * UNIT_NBYTES
        assert store.staging.stats()["leased_nbytes"] == before
    finally:
        gc.enable()


class HandedOver:
    """A read of a hole that ended, with the last of its bytes still on their way."""

    in_flight = True

    def __init__(self, transfer: Transfer) -> None:
        self.wait, self.cancel, self.nbytes = transfer.wait, transfer.cancel, transfer.nbytes

    def chunk_crcs(self, segment: int) -> bytes:
        return b"those of zeros"


@pytest.mark.parametrize("device", [None, "cpu"], ids=["host", "emulated"])
def test_what_was_read_of_a_hole_is_read_again_unless_more_of_it_may_land(
    store: KVStore, device: str | None
) -> None:
    sequence, reference = filled(store)
    sequence.read_ahead = False
    fully(store, sequence, reference)
    if device is not None:
        link_up(store, device)
    reference.check_layer(sequence, 0, device=device)
    sequence.prefetch([0])  # goes where the last read went
    reading = sequence._layers[0].reader.prefetched.reading
    for part in reading.parts:
        part.transfer.wait()
    reading.parts[:] = [replace(part, transfer=HandedOver(part.transfer)) for part in reading.parts]
    set_available(store, 0)
    store.paths.decide()
    if device is None:
        with pytest.raises(CorruptionError):
            sequence.read(0)
    reference.check_layer(sequence, 0, device=device)
    nothing_was_wrong(store)
