"""Memory that is registered with somebody until it goes, and what happens at an object's end."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest

from spdk_kv._native.holding import AtEnd, Registered
from spdk_kv._native.memory import Region
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.engines.uring import why_unavailable
from support.interrupts import Interrupt

PAGE = 4096


class Watched:
    """A region that can be watched."""

    def __init__(self) -> None:
        self.region = Region(PAGE)
        self.address, self.nbytes = self.region.address, self.region.nbytes


class Table:
    """Somebody who registers memory. (No native function, but nobody interrupts here.)"""

    def __init__(self, status: int | None = 0) -> None:
        self.status = status
        self.entries: list[tuple[int, int]] = []
        self.refuses = False

    def add(self, address: int, nbytes: int, *_: int) -> int | None:
        if not self.status:
            self.entries.append((address, nbytes))
        return self.status

    def remove(self, address: int) -> None:
        if self.refuses:
            raise OSError("no")
        self.entries = [entry for entry in self.entries if entry[0] != address]


@pytest.mark.parametrize("status", [0, None])
def test_memory_is_registered_until_its_last_reference_goes_and_then_freed(status):
    first, second, region = Table(status), Table(), Watched()
    registered, freed = Registered(region), weakref.ref(region)
    entry = (region.address, region.nbytes)
    del region
    assert registered.add(first.add, first.remove) == status
    assert registered.add(second.add, second.remove, 0) == 0
    memoryview(registered)[:5] = b"bytes"
    again = memoryview(registered)
    del registered
    assert first.entries == second.entries == [entry]
    assert bytes(again[:5]) == b"bytes"
    del again
    assert first.entries == second.entries == []
    assert freed() is None


def test_what_could_not_be_registered_is_not_unregistered():
    table = Table(12)
    table.refuses = True  # a call of `remove` would be reported, which fails the test
    assert Registered(Watched()).add(table.add, table.remove) == 12


def test_memory_that_cannot_be_unregistered_is_never_freed(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: reported.append(said.exc_type))
    table, region = Table(), Watched()
    freed = weakref.ref(region)
    registered = Registered(region)
    registered.add(table.add, table.remove)
    table.refuses = True
    del registered, region
    gc.collect()
    assert reported == [OSError]
    assert freed() is not None


def test_no_interrupt_leaves_memory_registered(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason[0])
    path = str(tmp_path / "data")
    engine = open_engine(parse_location(f"file://{path}"), path, engine="uring")
    backend = engine._backend
    if not backend.fixed_buffers:
        pytest.skip("this kernel registers no buffers")
    before, regions = backend.registered, []
    for at in range(1, 4):
        regions.append(engine.allocate(PAGE))
        assert backend.registered == before + 1
        Interrupt(at).run(regions.clear)
        assert backend.registered == before
    engine.close()


def test_an_end_comes_once_with_the_last_reference():
    called: list[int] = []
    end = AtEnd(called.append, 7)
    other = end
    del end
    assert called == []
    del other
    assert called == [7]
