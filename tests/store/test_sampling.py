"""What a store counts: :meth:`KVStore.sample`, and the file beside its lock."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spdk_kv
from paths.helpers import DIRECT_ENGINES, SHAPE, UNIT_NBYTES, UNITS, filled, open_dual, scans
from spdk_kv.errors import ClosedError, KeyNotFound
from spdk_kv.metrics import Reading, read_published
from spdk_kv.metrics.names import HELD
from spdk_kv.metrics.published import FILE_NAME
from spdk_kv.placement import owner_of
from store.helpers import folder_fixture, open_store
from support.waiting import wait_until

folder = folder_fixture


def told(where: Path) -> Reading | None:
    return read_published(str(where), owner_of(where / "lock"))


def test_hits_misses_and_bytes_of_blobs(folder: Path) -> None:
    with open_store(folder, engine=DIRECT_ENGINES[0]) as store:
        before = store.sample()
        store.put_many({"a": torch.ones(1000), "b": torch.ones(5000)})
        store.get_many(["a", "b", "a"])
        with pytest.raises(KeyNotFound):
            store.get("c")
        after = store.sample()
        assert (after.held["hits"], after.held["misses"], after.held["blobs"]) == (3, 1, 2)
        assert list(after.paths) == ["direct", "page_cache"]
        read, write = (after.paths["direct"].ops[op] for op in ("read", "write"))
        # Whole blocks.
        assert write.nbytes - before.paths["direct"].ops["write"].nbytes == 4096 + 5 * 4096
        assert read.nbytes - before.paths["direct"].ops["read"].nbytes == 7 * 4096
        assert read.transfers - before.paths["direct"].ops["read"].transfers == 1
        assert before.opened_s == after.opened_s <= before.time_s <= after.time_s
        assert before.clock_s <= after.clock_s
        assert before.cpu_ns <= after.cpu_ns
    with pytest.raises(ClosedError):
        store.sample()


def test_every_number_that_has_a_name_is_counted(folder: Path) -> None:
    """A name without a number would be a hole in the dashboard."""
    with open_dual(folder, engine=DIRECT_ENGINES[0], write_budget="1 GiB/day") as store:
        assert set(store.sample().held) == {number.field for number in HELD}


def test_units_and_bytes_by_path_and_by_sequence(folder: Path) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES, engine=DIRECT_ENGINES[0]) as store:
        sequence, reference = filled(store)
        total = UNITS * UNIT_NBYTES
        (one,) = store.sample().sequences
        assert one["name"] == "sequence 's'"
        assert (one["nbytes"], one["written_nbytes"], one["read_nbytes"]) == (total, total, 0)
        scans(sequence, reference, 2)
        found = store.sample()
        assert found.paths["page_cache"].units + found.paths["direct"].units == UNITS
        assert found.paths["page_cache"].units == 4
        assert found.paths["page_cache"].units_nbytes == 4 * UNIT_NBYTES
        assert found.paths["direct"].units_nbytes == 4 * UNIT_NBYTES
        assert found.held["budget_nbytes"] > 0
        (one,) = found.sequences
        assert (one["cached_units"], one["cached_nbytes"]) == (4, 4 * UNIT_NBYTES)
        assert one["read_nbytes"] == 2 * total
        other = store.sequence("t", SHAPE)
        other.append(0, *torch.ones(2, 1, 2, 2048, 64))
        other.settle(0)
        names = [each["name"] for each in store.sample().sequences]
        assert names == ["sequence 't'", "sequence 's'"], "used last comes first"


def test_the_write_budget(folder: Path) -> None:
    with open_store(folder, write_budget="1 MiB/year") as store:
        before = store.sample()
        assert before.held["write_budget_nbytes"] == 1 << 20
        assert before.held["write_budget_period_s"] == 365 * 86400
        assert before.held["write_budget_left_nbytes"] <= 1 << 17
        store.put("a", torch.ones(1 << 16))
        with pytest.raises(spdk_kv.WriteBudgetSpent):
            store.put("b", torch.ones(10))
        after = store.sample()
        assert after.held["declined_writes"] == 1
        assert after.held["write_budget_left_nbytes"] < 0
        # It comes back by itself, which is nothing that was done.
        later = {**after.held, "write_budget_left_nbytes": 5}
        assert replace(after, held=later).same_activity(after)
        assert not after.same_activity(before)


@pytest.mark.parametrize("where", ["ram://", "null://"])
def test_a_store_in_memory_has_one_path_and_no_file(where: str) -> None:
    with open_store(where) as store:
        assert list(store.sample().paths) == ["memory"]
        assert "budget_nbytes" not in store.sample().held


def test_a_store_through_the_page_cache_says_so(folder: Path) -> None:
    with open_store(folder, engine="pagecache") as store:
        assert list(store.sample().paths) == ["page_cache"]


def test_an_open_store_tells_others_and_a_closed_one_does_not(folder: Path) -> None:
    with open_store(folder) as store:
        found = wait_until(lambda: told(folder))
        assert found.pid == os.getpid()
        assert found.sample.store == store.location
        assert found.sample.opened_s == store.opened_s
        # A reader beside it is nobody's owner, and tells nothing.
        with spdk_kv.open(f"file://{folder}", read_only=True) as reader:
            reader.sample()
        assert (folder / FILE_NAME).exists()
    assert not (folder / FILE_NAME).exists()
    assert told(folder) is None
    with open_store(folder):
        wait_until(lambda: told(folder))


def test_a_forgotten_store_stops_telling(folder: Path) -> None:
    store = open_store(folder)
    wait_until(lambda: told(folder))
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
    assert not (folder / FILE_NAME).exists()


def test_the_numbers_grow_and_never_shrink(folder: Path) -> None:
    """Prometheus takes a counter that shrinks for a restart."""
    with open_store(folder) as store:
        last: list[int] = []
        for turn in range(30):
            store.put("k", torch.full((1 << 14,), turn))
            store.get("k")
            path = next(iter(store.sample().paths.values()))
            now = [path.busy_ns, path.cpu_ns, *(path.ops[op].took_ns for op in path.ops)]
            assert all(new >= old for new, old in zip(now, last, strict=False))
            last = now
