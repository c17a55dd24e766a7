"""Which units are read through the page cache: decisions that the real kernel's pages follow."""

from __future__ import annotations

import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from paths.helpers import (
    DIRECT_ENGINES,
    MIB,
    PLENTY,
    SHAPE,
    UNIT_NBYTES,
    UNITS,
    dropped,
    empty_cache,
    filled,
    open_dual,
    paths,
    resident,
    resident_nbytes,
    scans,
    set_available,
    settled,
    units,
)
from sequence.helpers import Reference
from spdk_kv.binding.memory_limit import memory_group, why_impossible
from spdk_kv.units import KIB
from store.helpers import folder_fixture, open_store
from support.subprocesses import run_script

# The pages are the real ones: whatever takes memory meanwhile may have them.
pytestmark = pytest.mark.machine
folder = folder_fixture
engines = pytest.mark.parametrize("engine", DIRECT_ENGINES)


@engines
@pytest.mark.parametrize("tokens", [32, 2048])
def test_a_few_bytes_behind_cached_units_are_written_where_they_are_read(
    folder: Path, engine: str, tokens: int
) -> None:
    """And a prompt's many are not, nor those of a layer that is read directly."""
    with open_dual(folder, engine=engine) as store:
        shape = replace(SHAPE, max_tokens=8192)
        sequence = store.sequence("s", shape)
        reference = Reference(shape, 1)
        reference.append(sequence, 2048)
        settled(sequence)
        scans(sequence, reference)
        assert paths(store) == ["C"] * UNITS
        before = resident_nbytes(store)
        reference.append(sequence, tokens)
        settled(sequence)
        few = tokens == 32
        written = UNITS * UNIT_NBYTES * tokens // 2048
        assert resident_nbytes(store) - before == (written if few else 0)
        scans(sequence, reference)
        assert (store.stats()["residency"]["filled_nbytes"] == before) == few

        set_available(store, 0)
        scans(sequence, reference, 2)
        dropped(store)
        # A page that the kernel has a use for just then stays.
        before = resident_nbytes(store)
        assert before < UNIT_NBYTES
        reference.append(sequence, 32)
        settled(sequence)
        assert resident_nbytes(store) <= before
        scans(sequence, reference)


@engines
def test_what_is_read_ahead_first_of_all_goes_by_a_decision_too(folder: Path, engine: str) -> None:
    with open_dual(folder, engine=engine) as store:
        sequence, reference = filled(store)
        sequence.prefetch([1, 2, 3])
        scans(sequence, reference)
        assert paths(store) == ["C"] * UNITS
        told = store.stats()["residency"]
        assert told["decisions"] == 1
        assert told["direct_read_nbytes"] == 0
        assert told["filled_nbytes"] == UNITS * UNIT_NBYTES
        scans(sequence, reference)
        assert store.stats()["residency"]["decisions"] == 2


@engines
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_pages_follow_the_decision(folder: Path, engine: str, granularity: str) -> None:
    with open_dual(folder, engine=engine) as store:
        sequence, reference = filled(store, granularity=granularity)
        assert resident_nbytes(store) == 0  # written past the page cache
        scans(sequence, reference, 2)
        assert paths(store) == ["C"] * UNITS
        assert [resident(store, unit) for unit in units(store)] == [UNIT_NBYTES] * UNITS

        set_available(store, UNITS * UNIT_NBYTES // 2)
        scans(sequence, reference)
        dropped(store)
        kept = paths(store)
        assert 0 < kept.count("C") <= UNITS // 2
        assert [resident(store, unit) for unit in units(store)] == [
            UNIT_NBYTES if path == "C" else 0 for path in kept
        ]
        # A page-cache path that is full is not read into by the other one.
        scans(sequence, reference, 3)
        assert paths(store) == kept
        assert resident_nbytes(store) == kept.count("C") * UNIT_NBYTES

        set_available(store, PLENTY)
        scans(sequence, reference, 2)
        assert paths(store) == ["C"] * UNITS
        assert resident_nbytes(store) == UNITS * UNIT_NBYTES

        set_available(store, 0)
        scans(sequence, reference)
        dropped(store)
        assert paths(store) == ["D"] * UNITS
        assert resident_nbytes(store) == 0
        scans(sequence, reference)
        assert resident_nbytes(store) == 0


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_only_what_is_to_be_cached_is_brought_in(folder: Path, granularity: str) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store, granularity=granularity)
        scans(sequence, reference, 2)
        assert paths(store).count("C") == 4
        assert [resident(store, unit) for unit in units(store)] == [
            UNIT_NBYTES if path == "C" else 0 for path in paths(store)
        ]


@engines
def test_a_unit_that_is_larger_than_the_budget_is_read_directly(folder: Path, engine: str) -> None:
    with open_dual(folder, UNIT_NBYTES // 2, engine=engine) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 3)
        assert paths(store) == ["D"] * UNITS
        assert resident_nbytes(store) == 0
        reasons = {entry["why"] for entry in store.why()}
        assert all(
            reason.startswith("direct: its 1.0 MiB exceed the budget of") for reason in reasons
        )


def test_a_growing_sequence_is_moved_out_when_it_no_longer_fits(folder: Path) -> None:
    with open_dual(folder, UNITS * UNIT_NBYTES // 2) as store:
        sequence, reference = filled(store, tokens=512)
        scans(sequence, reference, 2)
        assert paths(store) == ["C"] * UNITS
        for _ in range(6):
            reference.append(sequence, 256)
            settled(sequence)  # what is still being written is not read, and so not brought in
            scans(sequence, reference)
        dropped(store)
        held = sum(unit.nbytes for unit in units(store) if unit.cached)
        assert 0 < held <= store.stats()["residency"]["budget_nbytes"]
        # A page that the kernel has a use for just then stays.
        assert held <= resident_nbytes(store) < held + UNIT_NBYTES // 4


def test_heavier_layers_are_kept_first(folder: Path) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        sequence.set_weight([1, 3], 2.0)
        scans(sequence, reference, 2)
        assert paths(store) == list("DDCCDDCC")
        with pytest.raises(ValueError, match="finite"):
            sequence.set_weight([0], float("nan"))


def test_a_sequence_that_sleeps_gives_its_place_to_one_in_use(folder: Path) -> None:
    with open_dual(folder, UNITS * UNIT_NBYTES + 2 * MIB) as store:
        first, first_reference = filled(store, "first")
        scans(first, first_reference, 2)
        assert paths(store) == ["C"] * UNITS
        second, second_reference = filled(store, "second")
        scans(second, second_reference, 12)
        assert paths(store)[UNITS:] == ["C"] * UNITS
        assert paths(store)[:UNITS].count("C") == 0
        scans(first, first_reference)  # and its bytes are right from the other path


def test_a_deleted_sequence_leaves_no_pages_and_its_extents_are_used_again(folder: Path) -> None:
    with open_dual(folder, capacity="9 MiB") as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        cached = units(store)
        sequence.delete()
        dropped(store)
        assert sum(resident(store, unit) for unit in cached) == 0
        assert store.why() == []
        store.flush()
        again, other = filled(store, "again")
        assert [unit.extents for unit in units(store)] == [unit.extents for unit in cached]
        scans(again, other, 3)


def test_what_is_read_while_its_pages_go_is_not_missed_after_that(folder: Path) -> None:
    with open_dual(folder) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        drop = store.paths.routes.cache.drop

        def slowly(offset: int, nbytes: int) -> None:
            store.paths.routes.cache.drop = drop
            drop(offset, nbytes)
            set_available(store, PLENTY)
            scans(sequence, reference, 3)
            assert paths(store) == ["C"] * UNITS
            drop(offset, nbytes)

        store.paths.routes.cache.drop = slowly
        set_available(store, 0)
        store.paths.decide()
        dropped(store)
        assert store.paths.routes.cache.drop == drop
        scans(sequence, reference)
        assert store.stats()["residency"]["missed_nbytes"] == 0
        assert resident_nbytes(store) == UNITS * UNIT_NBYTES


def test_a_cache_emptied_behind_our_back_is_noticed_and_filled_again(folder: Path) -> None:
    with open_dual(folder, 2 * UNITS * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 3)
        before = store.stats()["residency"]
        assert before["missed_nbytes"] == 0
        empty_cache(folder / "data")
        assert resident_nbytes(store) < UNITS * UNIT_NBYTES // 2  # some is read ahead just now
        scans(sequence, reference)
        missed = store.stats()["residency"]["missed_nbytes"]
        assert missed > 0  # until the alarm; what comes back after that is no miss
        scans(sequence, reference, 3)
        after = store.stats()["residency"]
        assert after["cached_units"] == UNITS
        assert after["budget_nbytes"] == before["budget_nbytes"]
        assert after["missed_nbytes"] == missed
        assert resident_nbytes(store) == UNITS * UNIT_NBYTES


def in_group(folder: Path, script: str) -> None:
    """Runs ``script`` in a process of its own in a memory cgroup, with ``limit`` and ``usage``,
    the group's files, and ``where``, a folder for a store."""
    if os.geteuid():
        pytest.skip("a memory cgroup needs root")
    if reason := why_impossible():
        pytest.skip(reason)
    with memory_group() as group:
        names = ("memory.max", "memory.current")
        if group.version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        preamble = textwrap.dedent(f"""
            import os, time
            from pathlib import Path
            from paths.helpers import *
            where, group = Path({str(folder)!r}), Path({str(group.path)!r})
            limit, usage = (group / name for name in {names!r})
            (group / "cgroup.procs").write_text(str(os.getpid()))

            def large(store):
                shape = spdk_kv.KVShape(16, 2, 64, torch.float32, 4096)  # 32 units of 2 MiB
                sequence, reference = store.sequence("s", shape), Reference(shape)
                for _ in range(4):
                    reference.append(sequence, 1024)
                settled(sequence)
                return sequence, reference
            """)
        run_script(script, preamble=preamble)


def test_a_cgroup_that_shrinks_takes_units_off_the_page_cache(folder: Path) -> None:
    in_group(
        folder,
        """
        limit.write_text(str(1 << 30))
        with open_store(where, capacity="80 MiB") as store:
            sequence, reference = large(store)
            scans(sequence, reference, 2)
            wide = store.stats()["residency"]
            assert wide["limited_by"].endswith(group.name), wide
            assert wide["available_nbytes"] < 1 << 30, wide
            assert set(paths(store)) == {"C"}, wide
            total = sum(unit.nbytes for unit in units(store))
            others = int(usage.read_text()) - total
            limit.write_text(str(others + 40 * MIB))  # of which our own buffers take a part
            scans(sequence, reference, 2)
            tight = store.stats()["residency"]
            assert tight["available_nbytes"] < total, tight
            assert "D" in paths(store), tight
            scans(sequence, reference, 2)
            limit.write_text(str(1 << 30))
            # Not while this machine's memory is under pressure, be it by others.
            until = time.monotonic() + 90
            while set(paths(store)) != {"C"}:
                assert time.monotonic() < until, store.stats()["residency"]
                scans(sequence, reference)
        """,
    )


def test_a_budget_that_promises_too_much_is_found_out(folder: Path) -> None:
    in_group(
        folder,
        """
        with open_dual(where, capacity="80 MiB") as store:
            sequence, reference = large(store)
            total = sum(unit.nbytes for unit in units(store))
            assert total == 64 << 20
            scans(sequence, reference)
            others = int(usage.read_text()) - resident_nbytes(store)
            limit.write_text(str(others + 40 * MIB))  # of which our own buffers take a part
            scans(sequence, reference, 8)
            told = store.stats()["residency"]
            assert told["available_nbytes"] == PLENTY
            assert told["missed_nbytes"] > 0, told
            assert told["budget_nbytes"] < total, told
            assert 0 < told["cached_nbytes"] < total, told
            scans(sequence, reference, 2)
            again = store.stats()["residency"]
            assert again["missed_nbytes"] - told["missed_nbytes"] < total // 4, (told, again)
        """,
    )


# -- policies and what they say -------------------------------------------------------------------


def test_stats_and_why_tell_the_same_story(folder: Path) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        assert store.stats()["residency"]["reason"] == "nothing was decided yet"
        scans(sequence, reference, 3)
        told, why = store.stats()["residency"], store.why()
        assert (told["policy"], told["paths"], told["units"]) == ("adaptive", 2, UNITS)
        assert told["available_nbytes"] == 5 * UNIT_NBYTES
        assert told["limited_by"] == "what was given"
        assert told["cached_units"] == 4
        assert told["cached_nbytes"] == 4 * UNIT_NBYTES <= told["budget_nbytes"] < 5 * UNIT_NBYTES
        assert "it holds 4 of 8 units, 4.0 MiB" in told["reason"]
        # The first scan filled the cache, the others found it there; half went directly.
        assert told["cached_read_nbytes"] == 3 * 4 * UNIT_NBYTES
        assert told["filled_nbytes"] == 4 * UNIT_NBYTES
        assert told["direct_read_nbytes"] == 3 * 4 * UNIT_NBYTES
        assert told["missed_nbytes"] == told["taken_over_nbytes"] == told["demotions"] == 0
        assert (told["decisions"], told["promotions"]) == (3, 4)
        assert [(entry["layer"], entry["part"]) for entry in why] == [
            (layer, part) for layer in range(SHAPE.layers) for part in "kv"
        ]
        assert {entry["sequence"] for entry in why} == {"sequence 's'"}
        assert {entry["nbytes"] for entry in why} == {UNIT_NBYTES}
        assert [entry["path"] for entry in why].count("page cache") == 4
        for entry in why:
            kind = "page cache" if entry["path"] == "page cache" else "direct"
            assert entry["why"].startswith(f"{kind}: number ")


@engines
def test_pagecache_writes_through_the_cache_and_direct_uses_none(folder: Path, engine: str) -> None:
    with open_dual(folder / "a", engine=engine, policy="pagecache") as store:
        sequence, reference = filled(store)
        assert resident_nbytes(store) == UNITS * UNIT_NBYTES  # before any read
        scans(sequence, reference, 2)
        told = store.stats()["residency"]
        assert told["direct_read_nbytes"] == told["filled_nbytes"] == 0
        assert told["cached_read_nbytes"] == 2 * UNITS * UNIT_NBYTES
    with open_dual(folder / "a", engine=engine, capacity=None, policy="direct") as store:
        again = store.sequence("s")
        scans(again, reference, 2)
        assert store.paths.routes.cache is None
        told = store.stats()["residency"]
        assert (told["paths"], told["cached_read_nbytes"]) == (1, 0)
        assert told["reason"] == "residency is 'direct': the page cache is not used"
        assert {entry["why"] for entry in store.why()} == {told["reason"]}


def test_paper_binds_the_first_layers_for_good(folder: Path) -> None:
    with open_dual(folder, 3 * UNIT_NBYTES, policy="paper") as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        assert paths(store) == list("CCCDDDDD")
        set_available(store, PLENTY)
        scans(sequence, reference, 2)
        assert paths(store) == list("CCCDDDDD")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "pagecache"}, "pagecache was asked for: everything goes through the page"),
        ({"engine": "ram"}, "the engine ram has no page cache beside it"),
    ],
)
def test_one_path_only_says_why(folder: Path, options: dict[str, str], reason: str) -> None:
    where: Path | str = "ram://" if options["engine"] == "ram" else folder
    with open_dual(where, engine=None if where == "ram://" else "pagecache") as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 3)
        told = store.stats()["residency"]
        assert told["paths"] == 1
        assert reason in told["reason"]
        assert all(reason in entry["why"] for entry in store.why())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"policy": "fast"}, "adaptive, paper, direct, pagecache"),
        ({"memory": -1}, "negative|-1"),
        ({"memory": "much"}, "much"),
    ],
)
def test_wrong_residency_is_refused_before_a_store_is_begun(
    folder: Path, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        open_store(folder / "new", **options)
    assert not (folder / "new").exists()


@pytest.mark.parametrize("given", ["3 MiB", 3 * 1024 * KIB])
def test_page_cache_is_the_budget(folder: Path, given: str | int) -> None:
    with open_store(folder, capacity="64 MiB", memory=given) as store:
        sequence, reference = filled(store)
        scans(sequence, reference)
        told = store.stats()["residency"]
        assert (told["available_nbytes"], told["limited_by"]) == (3 * MIB, "what was given")
