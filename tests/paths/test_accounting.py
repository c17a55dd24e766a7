"""What is counted of both paths, and what the next decision is told of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paths.copies.helpers import fully, on_memory
from paths.helpers import filled, scans
from spdk_kv.memory import AvailableMemory
from spdk_kv.paths.accounting import Accounting
from spdk_kv.residency import Decision
from spdk_kv.store import KVStore
from store.helpers import open_store


@pytest.fixture
def store() -> Iterator[KVStore]:
    with open_store("ram://") as opened:
        yield opened


@pytest.fixture
def accounting(store: KVStore) -> Accounting:
    return Accounting(store.paths._policy, store.paths.routes, "")


def counted(accounting: Accounting) -> dict[str, int]:
    """What is not 0."""
    stats = accounting.stats([])
    names = ("read_nbytes", "filled_nbytes", "missed_nbytes", "over_nbytes", "tions", "decisions")
    return {name: count for name, count in stats.items() if name.endswith(names) and count}


def test_each_read_is_counted_by_its_path(accounting: Accounting) -> None:
    assert counted(accounting) == {}
    accounting.count_direct(1000)
    accounting.count_direct(1)
    for _ in range(2):
        accounting.count_cached(100, 30, 10)
    accounting.count_takeover(7)
    accounting.count_takeover(7)
    accounting.count_promotion()
    accounting.count_demotion()
    assert counted(accounting) == {
        "direct_read_nbytes": 1001,
        "cached_read_nbytes": 200,
        "filled_nbytes": 40,
        "missed_nbytes": 20,
        "taken_over_nbytes": 14,
        "promotions": 1,
        "demotions": 1,
    }


def test_a_decision_is_told_what_came_since_the_last(accounting: Accounting) -> None:
    assert accounting.take_recent() == (0, 0)
    assert not accounting.has_recent_misses
    accounting.count_cached(100, 30, 10)
    accounting.count_cached(100, 30, 10)
    assert accounting.has_recent_misses
    assert accounting.take_recent() == (140, 20)
    assert not accounting.has_recent_misses
    assert accounting.take_recent() == (0, 0)


def test_misses_beyond_a_share_of_the_budget_are_alarming(accounting: Accounting) -> None:
    memory = AvailableMemory(10_000, "the machine", None, ())
    assert accounting.record_decision(Decision(frozenset(), 1000, "why"), memory)
    assert not accounting.record_decision(Decision(frozenset(), 1000, "because"), memory)
    accounting.count_cached(100, 50, 50)
    assert not accounting.is_alarming
    accounting.count_cached(1, 1, 1)
    assert accounting.is_alarming
    told = accounting.stats([])
    assert (told["reason"], told["limited_by"]) == ("because", "the machine")
    assert (told["decisions"], told["budget_nbytes"]) == (2, 1000)


def test_what_is_copied_is_counted_as_written_and_as_read_there() -> None:
    with on_memory() as place, place.open() as store:
        sequence, reference = filled(store, tokens=500)
        fully(store, sequence, reference)
        before = store.stats()["residency"]
        assert before["written_nbytes"] == before["copied_nbytes"] > 0
        scans(sequence, reference)
        after = store.stats()["residency"]
        read = after["cached_read_nbytes"] - before["cached_read_nbytes"]
        assert read == before["copied_nbytes"]
        assert after["direct_read_nbytes"] == before["direct_read_nbytes"]
