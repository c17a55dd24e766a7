"""Two paths on two media: the drive, and a page cache that has copies of what is on the drive."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import spdk_kv
from link.helpers import DEVICES, link_up
from paths.copies.helpers import (
    CopyPlace,
    copied,
    copy_path,
    damage,
    deleted,
    fully,
    on_disk_nbytes,
    on_loop_device,
    on_memory,
    place_fixture,
    waited,
)
from paths.helpers import (
    MIB,
    PLENTY,
    SHAPE,
    UNIT_NBYTES,
    UNITS,
    empty_cache,
    filled,
    paths,
    resident,
    scans,
    set_available,
    settled,
    units,
)
from sequence.helpers import Reference
from sequence.test_groups import check_groups, some_groups
from spdk_kv.errors import ClosedError, DeviceError, DeviceTimeout
from spdk_kv.paths.units import Fill
from spdk_kv.units import KIB
from store.helpers import folder_fixture
from support import blockdev
from support.interrupts import interrupted_everywhere
from support.waiting import PATIENCE_S

folder = folder_fixture
place = place_fixture


# -- what is copied -------------------------------------------------------------------------------


@pytest.mark.machine
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_what_is_read_of_the_page_cache_path_is_copied_and_then_read_there(
    place: CopyPlace, granularity: str
) -> None:
    with place.open(5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store, granularity=granularity)
        assert on_disk_nbytes(store) == 0
        fully(store, sequence, reference)
        kept = paths(store)
        assert kept.count("C") == 4
        expected = [UNIT_NBYTES if path == "C" else 0 for path in kept]
        assert copied(store) == expected
        assert [resident(store, unit) for unit in units(store)] == expected
        before = store.stats()["residency"]
        scans(sequence, reference, 2)
        told = store.stats()["residency"]
        assert told["cached_read_nbytes"] - before["cached_read_nbytes"] == 8 * UNIT_NBYTES
        assert told["direct_read_nbytes"] - before["direct_read_nbytes"] == 8 * UNIT_NBYTES
        assert told["copied_nbytes"] == told["written_nbytes"] == 4 * UNIT_NBYTES
        assert told["missed_nbytes"] == told["taken_over_nbytes"] == 0


def test_groups_are_right_on_whichever_path_they_come(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store, granularity="token")
        seen: set[str] = set()
        for available in (PLENTY, 3 * UNIT_NBYTES, 0, PLENTY):
            set_available(store, available)
            for seed in range(3):
                scans(sequence, reference)
                for layer in range(reference.shape.layers):
                    groups = some_groups(sequence, 4, 40, seed)
                    check_groups(sequence, reference, layer, groups, 4)
            seen |= set(paths(store))
    assert seen == {"C", "D"}


@pytest.mark.machine
def test_who_leaves_the_page_cache_path_leaves_nothing_there(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store)
        for _ in range(3):
            set_available(store, PLENTY)
            scans(sequence, reference)
            fully(store, sequence, reference)
            assert copied(store) == [UNIT_NBYTES] * UNITS
            set_available(store, 0)
            scans(sequence, reference)
            waited(store)
            assert paths(store) == ["D"] * UNITS
            assert copied(store) == [0] * UNITS
            os.fsync(store.paths.routes.cache.fd)
            assert on_disk_nbytes(store) < UNIT_NBYTES // 4  # the filesystem's own blocks
            assert sum(resident(store, unit) for unit in units(store)) == 0


def test_what_is_appended_and_truncated_moves_the_end(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store, tokens=700)
        fully(store, sequence, reference)
        at = units(store)[0].filled
        for _ in range(4):
            reference.append(sequence, 33)
            scans(sequence, reference)
        fully(store, sequence, reference)
        assert units(store)[0].filled > at
        # Cut, then other tokens in the place of those that were copied.
        for keep in (650, 649, 640, 63, 1, 0):
            reference.truncate(sequence, keep)
            assert max(copied(store)) <= keep * 512
            reference.append(sequence, 700 - keep)
            scans(sequence, reference, 2)
        fully(store, sequence, reference)
        assert store.stats()["residency"]["taken_over_nbytes"] == 0


def test_extents_of_a_deleted_sequence_are_copied_for_their_next_owner(place: CopyPlace) -> None:
    with place.open(capacity="9 MiB" if place.uri == "ram://" else None) as store:
        for attempt in range(6):
            sequence, reference = filled(store, f"s{attempt}", tokens=1998 - 100 * attempt)
            fully(store, sequence, reference)
            at = [unit.extents for unit in units(store)]
            reference.append(sequence, 50)
            scans(sequence, reference)  # something is being copied when it is deleted
            deleted(store, sequence)
            again, other = filled(store, f"t{attempt}", tokens=2048 - 77 * attempt)
            assert [unit.extents for unit in units(store)] == at
            scans(again, other, 4)
            fully(store, again, other)
            deleted(store, again)
        waited(store)
        assert on_disk_nbytes(store) < UNIT_NBYTES // 4
        assert store.stats()["residency"]["taken_over_nbytes"] == 0


def test_the_order_of_rows_is_kept(place: CopyPlace) -> None:
    shape = spdk_kv.KVShape(2, 2, 32, torch.bfloat16, 2000, batch=3)
    with place.open() as store:
        sequence, reference = store.sequence("s", shape), Reference(shape)
        for rows in ([2, 0, 1], [0, 0, 2], [1, 1, 1]):
            reference.append(sequence, 400)
            scans(sequence, reference, 2)
            reference.reorder(sequence, rows)
            scans(sequence, reference, 2)
        fully(store, sequence, reference)
        scans(sequence, reference)


def test_a_readers_changes_of_what_it_got_are_not_copied(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store)
        for _ in range(3):
            for layer in range(SHAPE.layers):
                for part in sequence.read(layer):
                    part.zero_()
        waited(store)
        fully(store, sequence, reference)
        assert copied(store) == [UNIT_NBYTES] * UNITS
        assert store.stats()["residency"]["taken_over_nbytes"] == 0


def test_heads_are_read_from_what_was_copied(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store, granularity="head")
        reference.check_layer(sequence, 1, heads=[0])
        assert copied(store) == [0] * UNITS  # a part of a unit does not fill it
        fully(store, sequence, reference)
        before = store.stats()["residency"]["direct_read_nbytes"]
        for heads in ([0], [1], [1, 0]):
            reference.check_layer(sequence, 2, heads=heads, tokens=slice(100, 900))
        assert store.stats()["residency"]["direct_read_nbytes"] == before


def test_layers_read_ahead_are_right_though_they_leave_the_path_meanwhile(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store)
        for available in (PLENTY, 3 * UNIT_NBYTES) * 4:
            set_available(store, PLENTY)
            store.paths.decide()
            fully(store, sequence, reference)
            sequence.prefetch(range(4))
            set_available(store, 0)
            store.paths.decide()  # all is forgotten, and punched out
            waited(store)
            set_available(store, available)
            store.paths.decide()
            scans(sequence, reference)
        assert store.stats()["residency"]["taken_over_nbytes"] == 0


def test_copies_that_have_to_wait_are_made_later(
    place: CopyPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.open(staging="1 MiB") as store:
        sequence, reference = filled(store)
        assert store.paths.routes.copy.max_held_nbytes == 256 * KIB
        held: list[int] = []
        prepare = store.paths.routes.copy._prepare

        def noted(*arguments: Any) -> Any:
            held.append(store.paths.routes.copy._held_nbytes)
            return prepare(*arguments)

        monkeypatch.setattr(store.paths.routes.copy, "_prepare", noted)
        fully(store, sequence, reference)
        assert len(held) >= UNITS * 4
        assert max(held) <= 256 * KIB


def test_what_finds_no_room_is_not_copied_this_time() -> None:
    with on_memory() as place, place.open() as store:
        sequence, reference = filled(store, tokens=500)
        copy = store.paths.routes.copy
        full = copy._account.hold(copy.max_held_nbytes)
        scans(sequence, reference, 2)
        assert copy.written_nbytes == 0
        assert all(unit.fill is None for unit in units(store))
        del full
        fully(store, sequence, reference)
        assert copy.written_nbytes == sum(copied(store))
        assert store.stats()["residency"]["taken_over_nbytes"] == 0


def test_a_copy_that_cannot_be_begun_ends_and_is_begun_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with on_memory() as place, place.open() as store:
        sequence, reference = filled(store, tokens=500)
        copy = store.paths.routes.copy

        def refused(*arguments: Any, **options: Any) -> Any:
            raise ClosedError("as if it was closed")

        with monkeypatch.context() as patched:
            patched.setattr(copy.engine, "start", refused)
            scans(sequence, reference, 2)
        assert all(unit.fill is None for unit in units(store))
        assert copy._held_nbytes == 0
        fully(store, sequence, reference)
        assert copy.trouble == ""


def test_trouble_is_told_each_time_that_it_begins_and_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"), on_memory() as place, place.open() as store:
        sequence, reference = filled(store, tokens=500)
        copy = store.paths.routes.copy
        for times in (1, 2):
            for _ in range(2):
                copy.pause(DeviceError("as if the folder was full; make room"))
            assert copy.trouble == "as if the folder was full"
            assert caplog.text.count("going on without") == times
            before = copy.written_nbytes
            scans(sequence, reference)
            assert copy.written_nbytes == before
            assert caplog.text.count("is filled again") == times - 1
            copy._pause_decisions = 0
            reference.append(sequence, 200)
            settled(sequence)
            fully(store, sequence, reference)
            assert caplog.text.count("is filled again") == times


def test_a_hole_that_may_still_be_punched_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_memory() as place, place.open() as store:
        copy = store.paths.routes.copy
        unit = filled(store, tokens=100)[0]._body.group.units[0]

        def late(offset: int, nbytes: int) -> None:
            raise DeviceTimeout("as if the drop took too long", op="discard")

        for failure, left in ((late, 1), (copy.engine.drop, 0)):
            hole = copy.forget(unit)
            with monkeypatch.context() as patched:
                patched.setattr(copy.engine, "drop", failure)
                copy.punch(hole)
            assert copy._holes.count(hole) == left
            copy._holes.clear()


def test_a_store_that_is_closed_is_no_trouble_of_its_copies(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with on_memory() as place, place.open() as store:
        copy = store.paths.routes.copy
        copy.pause(ClosedError("the engine is closed"))
        assert (copy.trouble, copy._pause_decisions) == ("", 0)
        hole = copy.forget(filled(store, tokens=100)[0]._body.group.units[0])
        hole.fill = Fill(1, 0, 4096, 0)  # one that never ends, as on a drive that hangs
        copy.close()
        copy.pause(DeviceError("as if the drive had failed"))
        assert copy.trouble == ""
        assert "going on without" not in caplog.text
        punching = threading.Thread(target=copy.punch, args=(hole,), daemon=True)
        punching.start()
        punching.join(PATIENCE_S)
        assert not punching.is_alive()
        hole.fill = None
        copy.punch(hole)
        assert copy._holes == [hole], "the whole file is about to go"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_anywhere_while_a_copy_is_begun_leaves_nothing_half_begun(place: CopyPlace) -> None:
    with place.open(PLENTY) as store:
        sequence, reference = filled(store)
        store.paths.decide()
        copy, unit = store.paths.routes.copy, units(store)[0]
        lines = torch.zeros(len(unit.extents), 64 * KIB, dtype=torch.uint8)

        def forget(at: int) -> None:
            store.paths._dropper.drop_later(unit)
            waited(store)  # for ever, if a fill that was begun does not end

        def check(at: int) -> None:
            waited(store, lambda: unit.fill is None)

        def fill(at: int) -> None:
            copy.fill(unit, 0, lines, 16 * KIB)

        assert interrupted_everywhere(forget, fill, check) > 10
        forget(0)
        fully(store, sequence, reference)


# -- what the kernel and the media do -------------------------------------------------------------


@pytest.mark.machine
def test_what_the_kernel_evicts_comes_back_from_the_copys_own_drive(place: CopyPlace) -> None:
    with place.open(2 * UNITS * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        scans(sequence, reference)
        before = store.stats()["residency"]
        assert before["missed_nbytes"] == 0
        os.fsync(store.paths.routes.cache.fd)
        empty_cache(copy_path(store))
        assert sum(resident(store, unit) for unit in units(store)) < UNITS * UNIT_NBYTES // 2
        scans(sequence, reference)
        told = store.stats()["residency"]
        assert told["missed_nbytes"] > 0  # until the alarm
        scans(sequence, reference, 3)
        told = store.stats()["residency"]
        assert told["direct_read_nbytes"] == before["direct_read_nbytes"]
        assert told["cached_units"] == UNITS
        # A page that the kernel has another use for goes again.
        back = sum(resident(store, unit) for unit in units(store))
        assert back > UNITS * UNIT_NBYTES - UNIT_NBYTES // 4


def test_damaged_copies_are_found_and_the_drive_delivers(
    place: CopyPlace, caplog: pytest.LogCaptureFixture
) -> None:
    with place.open() as store:
        sequence, reference = filled(store)
        sequence.read_ahead = False
        fully(store, sequence, reference)
        damage(store)
        scans(sequence, reference)
        told = store.stats()["residency"]
        assert told["taken_over_nbytes"] == UNITS * UNIT_NBYTES
        assert "CRC32C differs" in told["trouble"]
        assert caplog.text.count("going on without filling the page cache") == 1
        scans(sequence, reference, 3)
        assert copied(store) == [0] * UNITS
        assert store.stats()["corruptions"] == 0
        # After a while it is tried again, and is well.
        scans(sequence, reference, 70)
        fully(store, sequence, reference)
        told = store.stats()["residency"]
        assert told["copied_nbytes"] == UNITS * UNIT_NBYTES
        assert told["taken_over_nbytes"] == UNITS * UNIT_NBYTES
        assert told["trouble"] == ""


def test_a_full_folder_means_reading_directly_and_is_told_once(
    place: CopyPlace, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with blockdev.ext4(folder, 8 * MIB) as small, place.open(folder=small) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 4)
        waited(store)
        scans(sequence, reference, 4)
        told = store.stats()["residency"]
        assert "ENOSPC" in told["trouble"]
        assert 0 < told["copied_nbytes"] < UNITS * UNIT_NBYTES
        assert told["taken_over_nbytes"] == 0
        assert caplog.text.count("going on without filling the page cache") == 1
        reasons = [entry["why"] for entry in store.why() if "ENOSPC" in entry["why"]]
        assert reasons
        assert all("of it are there so far: write of " in reason for reason in reasons)
        # With room again it goes on.
        set_available(store, 4 * UNIT_NBYTES)
        scans(sequence, reference, 70)
        fully(store, sequence, reference)
        assert store.stats()["residency"]["trouble"] == ""


def test_a_drive_that_fails_leaves_what_was_copied(folder: Path) -> None:
    with on_loop_device() as place, place.open(5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        sequence.read_ahead = False
        sequence.set_weight([1, 2], 2.0)
        fully(store, sequence, reference)
        assert paths(store) == list("DDCCCCDD")
        assert place.image is not None
        os.truncate(place.image, min(unit.extents[0][0] for unit in units(store)))
        for layer in (1, 2, 1, 2):
            reference.check_layer(sequence, layer)
        for layer in (0, 3):
            with pytest.raises(DeviceError, match="EIO"):
                sequence.read(layer)
        reference.check_layer(sequence, 1)
        os.truncate(place.image, 64 * MIB)
        sequence.delete()


def test_a_part_asked_of_the_drive_is_delivered_by_a_copy_made_since(folder: Path) -> None:
    with on_loop_device() as place, place.open() as store:
        sequence, reference = filled(store)
        sequence.read_ahead = False
        sequence.prefetch([0])  # nothing is copied yet: all of it from the drive
        prefetched = sequence._layers[0].reader.prefetched.take()
        for part in prefetched.parts:
            part.transfer.wait()
        fully(store, sequence, reference)
        assert place.image is not None
        os.truncate(place.image, min(unit.extents[0][0] for unit in units(store)))
        for unit, extent in zip(units(store)[:2], (range(1), range(1, 2)), strict=True):
            prefetched.request(unit, extent, 0, store.engine, 0, unit.filled)
        del prefetched.parts[:-2]
        prefetched.complete()
        assert store.stats()["residency"]["taken_over_nbytes"] == 2 * UNIT_NBYTES
        os.truncate(place.image, 64 * MIB)
        sequence.delete()


# -- over a link ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_what_goes_to_a_device_over_a_link_is_copied_too(
    place: CopyPlace, device: str, granularity: str
) -> None:
    with place.open(5 * UNIT_NBYTES) as store:
        link_up(store, device)
        sequence = store.sequence("s", SHAPE, granularity=granularity)
        reference = Reference(SHAPE, device=device)
        for count in (1, 700, 1300):
            reference.append(sequence, count)
            settled(sequence)
            for _ in range(6):
                for layer in range(SHAPE.layers):
                    reference.check_layer(sequence, layer, device=device)
                waited(store)
        assert min(nbytes for nbytes in copied(store) if nbytes) > UNIT_NBYTES // 2
        assert store.stats()["residency"]["taken_over_nbytes"] == 0
