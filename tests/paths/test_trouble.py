"""Two paths in trouble: media that fail or lie, and stores that end while units move."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paths.helpers import (
    DIRECT_ENGINES,
    MIB,
    PLENTY,
    UNIT_NBYTES,
    UNITS,
    dropped,
    dropping_held,
    empty_cache,
    fill_cache,
    filled,
    open_dual,
    paths,
    resident,
    scans,
    set_available,
    units,
)
from sequence.helpers import Reference
from spdk_kv.errors import ClosedError, CorruptionError, DeviceError
from spdk_kv.store import KVStore
from store.helpers import flip, folder_fixture
from support import blockdev
from support.subprocesses import run_script
from support.waiting import PATIENCE_S

folder = folder_fixture
engines = pytest.mark.parametrize("engine", DIRECT_ENGINES)


@dataclass
class Drive:
    """A store on a loop device over ``image``, in which the medium can be made to fail or lie.

    What the kernel has of ``node`` in its page cache is not touched by changes of ``image``.
    """

    store: KVStore
    node: str
    image: Path
    sequence: Any
    reference: Reference

    def fail(self) -> None:
        """From now on the drive answers EIO wherever there is data of the sequence."""
        os.truncate(self.image, min(unit.extents[0][0] for unit in units(self.store)))

    def damage(self, mask: int = 0x10) -> None:
        """Flips a bit of every unit on the medium; a second time mends it."""
        for unit in units(self.store):
            flip(self.image, unit.extents[0][0] + unit.nbytes // 2, mask)

    def took_over_nbytes(self) -> int:
        return int(self.store.stats()["residency"]["taken_over_nbytes"])


@pytest.fixture(params=DIRECT_ENGINES)
def drive(request: pytest.FixtureRequest, folder: Path) -> Iterator[Drive]:
    """All units are direct, none is in the page cache, and nobody reads ahead."""
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(24 * MIB)
    with blockdev.loop_device(image) as node:
        options = {"engine": request.param, "create": True, "index_dir": folder / "index"}
        store = open_dual(f"block://{node}", 0, capacity=None, **options)
        try:
            sequence, reference = filled(store)
            sequence.read_ahead = False
            scans(sequence, reference)
            yield Drive(store, node, image, sequence, reference)
        finally:
            with open(image, "ab") as file:
                file.truncate(24 * MIB)
            sequence.delete()
            store.close()


@pytest.mark.machine
def test_both_paths_of_a_device(drive: Drive) -> None:
    set_available(drive.store, 5 * UNIT_NBYTES)
    scans(drive.sequence, drive.reference, 3)
    kept = paths(drive.store)
    assert kept.count("C") == 4
    assert [resident(drive.store, unit) for unit in units(drive.store)] == [
        UNIT_NBYTES if path == "C" else 0 for path in kept
    ]
    set_available(drive.store, 0)
    scans(drive.sequence, drive.reference)
    dropped(drive.store)
    assert [resident(drive.store, unit) for unit in units(drive.store)] == [0] * UNITS


@pytest.mark.machine
def test_a_drive_that_fails_leaves_what_the_page_cache_holds(drive: Drive) -> None:
    set_available(drive.store, 5 * UNIT_NBYTES)
    drive.sequence.set_weight([1, 2], 2.0)
    scans(drive.sequence, drive.reference, 2)
    assert paths(drive.store) == list("DDCCCCDD")
    drive.fail()
    for layer in (1, 2, 1, 2):
        drive.reference.check_layer(drive.sequence, layer)
    for layer in (0, 3):
        with pytest.raises(DeviceError, match="EIO"):
            drive.sequence.read(layer)
    drive.reference.check_layer(drive.sequence, 1)


@pytest.mark.machine
def test_what_the_direct_path_cannot_read_the_page_cache_delivers(
    drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    fill_cache(drive.node)  # somebody else read the device
    drive.fail()
    scans(drive.sequence, drive.reference)
    assert paths(drive.store) == ["D"] * UNITS
    assert drive.took_over_nbytes() == UNITS * UNIT_NBYTES
    assert "the engine pagecache delivered it" in caplog.text
    assert "EIO" in caplog.text
    empty_cache(drive.node)
    with pytest.raises(DeviceError, match="EIO"):
        drive.sequence.read(0)


@pytest.mark.machine
def test_a_layer_read_ahead_from_a_failing_drive_is_delivered_too(drive: Drive) -> None:
    fill_cache(drive.node)
    drive.fail()
    drive.sequence.prefetch(range(4))
    scans(drive.sequence, drive.reference)
    drive.reference.truncate(drive.sequence, 1001)  # reads the chunk that is the tail again
    scans(drive.sequence, drive.reference)
    assert drive.took_over_nbytes() > UNITS * UNIT_NBYTES


@pytest.mark.machine
def test_a_damaged_medium_is_found_and_good_pages_replace_it(drive: Drive) -> None:
    fill_cache(drive.node)
    drive.damage()
    scans(drive.sequence, drive.reference)
    assert drive.took_over_nbytes() == UNITS * UNIT_NBYTES
    empty_cache(drive.node)
    for layer in range(4):
        with pytest.raises(CorruptionError, match="CRC32C differs"):
            drive.sequence.read(layer)
    drive.damage()
    scans(drive.sequence, drive.reference)


@pytest.mark.machine
def test_damaged_pages_are_found_and_a_good_medium_replaces_them(drive: Drive) -> None:
    drive.damage()
    fill_cache(drive.node)
    drive.damage()
    set_available(drive.store, PLENTY)
    with dropping_held(drive.store):  # promoted again before the thread comes to them
        scans(drive.sequence, drive.reference)
        assert drive.took_over_nbytes() == UNITS * UNIT_NBYTES
        assert paths(drive.store) == ["D"] * UNITS  # the pages are dropped
        scans(drive.sequence, drive.reference)
    assert paths(drive.store) == ["C"] * UNITS  # and read again
    assert drive.took_over_nbytes() == UNITS * UNIT_NBYTES


def test_damage_on_both_paths_is_an_error_on_each(drive: Drive) -> None:
    drive.damage()
    for available in (0, PLENTY, 0):
        set_available(drive.store, available)
        for layer in range(4):
            with pytest.raises(CorruptionError, match="CRC32C differs"):
                drive.sequence.read(layer)
    assert drive.store.stats()["corruptions"] > 0
    assert drive.took_over_nbytes() == 0


def test_a_read_that_failed_holds_its_memory_no_longer(drive: Drive) -> None:
    drive.damage()
    before, raised = drive.store.staging.stats()["leased_nbytes"], 0
    gc.collect()
    gc.disable()  # nothing is left to the collector, which may come late
    try:
        for layer in range(4):
            try:
                drive.sequence.read(layer)
            except CorruptionError:
                raised += 1
        assert raised == 4
        assert drive.store.staging.stats()["leased_nbytes"] == before
    finally:
        gc.enable()


def test_without_checksums_nothing_is_taken_over(folder: Path) -> None:
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(24 * MIB)
    with blockdev.loop_device(image) as node:
        options = {"create": True, "index_dir": folder / "index", "verify": False}
        store = open_dual(f"block://{node}", 0, capacity=None, **options)
        sequence, reference = filled(store)
        scans(sequence, reference)
        fill_cache(node)
        os.truncate(image, 2 * MIB)
        with pytest.raises(DeviceError, match="EIO"):
            sequence.read(3)
        os.truncate(image, 24 * MIB)
        sequence.delete()
        store.close()


# -- the end --------------------------------------------------------------------------------------


class Uses:
    """Threads that read, prefetch and move units until they meet an error each."""

    def __init__(self, store: KVStore, sequence: Any, reference: Reference) -> None:
        self.ended: list[BaseException] = []
        self._store, self._sequence, self._reference = store, sequence, reference
        works = [lambda: self._read(0), lambda: self._read(1), self._move]
        self._begun = threading.Barrier(len(works) + 1)
        self._threads = [threading.Thread(target=self._until_error, args=(w,)) for w in works]
        for thread in self._threads:
            thread.start()
        self._begun.wait()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _until_error(self, work: Callable[[], None]) -> None:
        self._begun.wait()
        try:
            while True:
                work()
        except BaseException as failure:
            self.ended.append(failure)

    def _read(self, layer: int) -> None:
        self._sequence.prefetch([(layer + 1) % 4])
        self._reference.check_layer(self._sequence, layer)

    def _move(self) -> None:
        for available in (0, 3 * UNIT_NBYTES, PLENTY):
            set_available(self._store, available)
            self._store.check_open()
            self._store.paths.decide()
        if not self._store.why():
            raise ClosedError("the sequence is gone")


@engines
@pytest.mark.parametrize("ending", ["close", "delete"])
def test_the_end_comes_while_others_read_and_units_move(
    folder: Path, engine: str, ending: str
) -> None:
    for attempt in range(5):
        store = open_dual(folder / str(attempt), engine=engine)
        sequence, reference = filled(store, tokens=900)
        scans(sequence, reference)
        uses = Uses(store, sequence, reference)
        threading.Event().wait(0.02 * attempt)
        if ending == "close":
            store.close()
        else:
            sequence.delete()
        uses.join()
        assert [end for end in uses.ended if not isinstance(end, ClosedError)] == []
        with pytest.raises(ClosedError) if ending == "close" else nullcontext():
            sequence.delete()  # the second time, if it was deleted
        store.close()
        store.close()


@engines
def test_a_closed_store_lets_go_of_its_second_path(folder: Path, engine: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    store = open_dual(folder, engine=engine)
    sequence, reference = filled(store)
    scans(sequence, reference, 2)
    set_available(store, 0)
    scans(sequence, reference)
    store.close()
    assert not any(
        os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(folder))
        for fd in set(os.listdir("/proc/self/fd")) - before
    )
    for call in (store.stats, store.why, lambda: sequence.read(0), lambda: sequence.prefetch([0])):
        with pytest.raises(ClosedError):
            call()
    # What was on the page-cache path is durable as anything else.
    with open_dual(folder, engine=engine, capacity=None) as again:
        scans(again.sequence("s"), reference, 2)


@engines
def test_a_child_after_fork_is_refused_and_the_parent_goes_on(folder: Path, engine: str) -> None:
    run_script(
        f"""
        import os
        from pathlib import Path
        from paths.helpers import *
        from spdk_kv.errors import ClosedError
        store = open_dual(Path({str(folder)!r}), engine={engine!r})
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        set_available(store, 3 * UNIT_NBYTES)
        scans(sequence, reference)
        sequence.prefetch(range(4))
        child = os.fork()
        if child == 0:
            status = 0
            for call in (store.stats, store.why, lambda: sequence.read(0),
                         lambda: sequence.prefetch([0]), lambda: sequence.settle(0)):
                try:
                    call()
                    status = 1
                except ClosedError:
                    pass
            store.close()
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        scans(sequence, reference, 2)
        set_available(store, PLENTY)
        scans(sequence, reference, 2)
        assert paths(store) == ["C"] * UNITS
        store.close()
        """
    )
