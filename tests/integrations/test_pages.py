"""Pages to a store and back: what is read is what was put; one that fails costs no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import spdk_kv
from spdk_kv.integrations.pages import get_pages, put_pages
from store.helpers import extent_of, flip

NBYTES = 10_000  # no multiple of a block


@pytest.fixture
def store(tmp_path):
    with spdk_kv.open(f"file://{tmp_path}/store", capacity="4 MiB") as store:
        yield store


def content(number: int, nbytes: int = NBYTES) -> bytearray:
    return bytearray(np.random.default_rng(number).bytes(nbytes))


def test_pages_come_back_as_they_were_put(store):
    pages = [(f"k{number}", content(number, nbytes)) for number, nbytes in enumerate((1, 0, 4097))]
    assert put_pages(store, pages) == [True] * 3
    places = [(key, bytearray(len(page))) for key, page in pages]
    assert get_pages(store, places) == [True] * 3
    assert places == pages


def test_only_what_is_there_in_that_length_is_read(store):
    put_pages(store, [("a", content(1)), ("b", content(2))])
    places = [("a", bytearray(NBYTES)), ("b", bytearray(NBYTES - 1)), ("c", bytearray(5))]
    assert get_pages(store, places) == [True, False, False]
    assert places[0][1] == content(1)


def test_a_tensor_of_the_same_length_is_no_page(store):
    store.put("a", np.zeros(NBYTES // 4, np.float32))
    put_pages(store, [("b", content(2))])
    places = [("a", bytearray(NBYTES)), ("b", bytearray(NBYTES))]
    assert get_pages(store, places) == [False, True]
    assert places[1][1] == content(2)


def test_a_damaged_page_costs_no_other_one(store, tmp_path):
    pages = [(f"k{number}", content(number)) for number in range(3)]
    put_pages(store, pages)
    store.flush()
    offset, nbytes = extent_of(store, "k1")
    flip(Path(tmp_path, "store", "data"), offset + nbytes // 2)
    places = [(key, bytearray(NBYTES)) for key, _ in pages]
    assert get_pages(store, places) == [True, False, True]
    assert (places[0], places[2]) == (pages[0], pages[2])
    assert store.stats()["corruptions"] == 1
    assert "k1" not in store


def test_what_has_room_is_stored(tmp_path):
    with spdk_kv.open(f"file://{tmp_path}/small", capacity="12 KiB", eviction="none") as store:
        pages = [(f"k{number}", content(number, 4096)) for number in range(5)]
        assert put_pages(store, pages) == [True, True, True, False, False]
        assert len(store) == 3


def test_a_page_that_is_stored_is_not_written_again(store):
    page = ("a", content(1))
    put_pages(store, [page])
    offset = store._records.blobs["a"].offset
    assert put_pages(store, [page], again=False) == [True]
    assert store._records.blobs["a"].offset == offset
    # Of another length it is other content.
    assert put_pages(store, [("a", content(2, 5))], again=False) == [True]
    assert store.sizes(["a", "b"]) == [5, None]


def test_a_reader_stores_nothing_and_says_so(store, tmp_path, caplog):
    put_pages(store, [("a", content(1))])
    store.flush()
    with spdk_kv.open(f"file://{tmp_path}/store", read_only=True) as reader:
        assert put_pages(reader, [("b", content(2))]) == [False]
        assert "read_only" in caplog.text
        assert reader.sizes(["a", "b"]) == [NBYTES, None]
        place = bytearray(NBYTES)
        assert get_pages(reader, [("a", place)]) == [True]
        assert place == content(1)


def test_of_pages_that_are_read_together_the_last_is_evicted_first(tmp_path):
    with spdk_kv.open(f"file://{tmp_path}/small", capacity="32 KiB") as store:
        pages = [(f"k{number}", content(number, 4096)) for number in range(8)]
        put_pages(store, pages)
        assert all(get_pages(store, [(key, bytearray(4096)) for key, _ in pages]))
        put_pages(store, [(f"new{number}", content(number, 4096)) for number in range(2)])
        kept = [key in store for key, _ in pages]
        assert kept == sorted(kept, reverse=True)
        assert 0 < kept.count(True) < 8


def test_pages_that_are_brought_again_are_evicted_later(tmp_path):
    with spdk_kv.open(f"file://{tmp_path}/small", capacity="32 KiB") as store:
        old = [(f"old{number}", content(number, 4096)) for number in range(4)]
        newer = [(f"newer{number}", content(number, 4096)) for number in range(4)]
        for pages in (old, newer, old):
            assert all(put_pages(store, pages, again=False))
        put_pages(store, [(f"new{number}", content(number, 4096)) for number in range(4)])
        assert all(key in store for key, _ in old)
        assert not any(key in store for key, _ in newer)
