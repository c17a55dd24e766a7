"""Records whose extents overlap or cannot be: a bug's or a mistake's, whole by their checksums."""

from __future__ import annotations

import logging

import torch
from hypothesis import given
from hypothesis import strategies as st

import spdk_kv
from spdk_kv.placement import damaged_extents
from store.helpers import check_books, folder_fixture, open_store, payload, reopen, version_of

folder = folder_fixture
BLOCK, START, END = 8, 16, 160


def test_records_that_overlap_cost_themselves_and_nothing_else(folder, caplog):
    with open_store(folder) as store:
        store.put_many({key: payload(key, 1, 70_000) for key in "abc"})
    shape = spdk_kv.KVShape(1, 1, 64, torch.float16, 100)
    k = torch.ones(1, 1, 50, 64, dtype=torch.float16)
    with reopen(folder) as opened:
        for name in ("fine", "hit"):
            opened.sequence(name, shape).append(0, k, k)
        opened.flush()
        records = opened.catalog.records
        beyond = records.blobs["b"]._replace(offset=1 << 40)
        second = records.sequences["hit"].pieces[0].runs[0] + BLOCK
        within = records.blobs["b"]._replace(offset=second)
        wrong = {"twin": records.blobs["a"], "beyond": beyond, "within": within}
        opened.catalog.committer.index.commit(wrong, {})
    with caplog.at_level(logging.ERROR, "spdk_kv"):
        opened = reopen(folder, verify=False)
    assert "dropped" in caplog.text
    assert all(repr(name) in caplog.text for name in ("a", "twin", "beyond", "within", "hit"))
    with opened:
        assert set(opened.keys()) == {"b", "c"}
        assert [version_of(key, opened.get(key)) for key in "bc"] == [1, 1]
        assert opened.sequences() == ["fine"]
        assert torch.equal(opened.sequence("fine").read(0)[0], k)
        assert opened.stats()["corruptions"] == 5
        check_books(opened)
    with reopen(folder) as opened:
        assert opened.stats()["corruptions"] == 0
        assert set(opened.keys()) == {"b", "c"}
        check_books(opened)


@given(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 40), st.sampled_from([0, 0, 0, 3]))))
def test_those_that_cannot_be_together_are_found_by_pairs(parts):
    extents = [(BLOCK * block + off, nbytes) for block, nbytes, off in parts]

    def blocks(offset: int, nbytes: int) -> set[int]:
        return set(range(offset, offset + -(-nbytes // BLOCK) * BLOCK))

    taken = [blocks(*extent) for extent in extents]
    wanted = {
        number
        for number, (offset, nbytes) in enumerate(extents)
        if offset % BLOCK
        or not nbytes
        or not taken[number] <= set(range(START, END))
        or any(taken[number] & other for at, other in enumerate(taken) if at != number)
    }
    assert damaged_extents(extents, BLOCK, START, END) == wanted
