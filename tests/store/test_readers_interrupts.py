"""Ctrl-C anywhere in a reader: its next call finds what is there, and its writer goes on."""

from __future__ import annotations

import pytest

from spdk_kv.errors import SpdkKvError
from spdk_kv.index import descriptors
from store.helpers import folder_fixture, open_store, payload, version_of
from store.test_readers import SHAPE, open_reader, prompt, same_tokens
from support.interrupts import interrupted_everywhere
from support.rounds import rounds
from support.waiting import PATIENCE_S

folder = folder_fixture
STEP = rounds(7, long=1)


@pytest.fixture
def writer(folder):
    with open_store(folder, engine="pagecache") as store:
        yield store


def put(store, at: int) -> None:
    store.put("a", payload("a", at, 20_000))
    store.put(f"new {at}", payload(f"new {at}", at))
    store.flush()


@pytest.mark.parametrize("call", ["get", "get_async", "contains", "refresh"])
def test_a_reader_that_is_interrupted_goes_on(folder, writer, call):
    with open_reader(folder, engine="pagecache") as reader:

        def use(at: int) -> None:
            if call == "get":
                reader.get(f"new {at}")
            elif call == "get_async":
                reader.get_async(f"new {at}").result(PATIENCE_S)
            elif call == "contains":
                assert f"new {at}" in reader
            else:
                reader.refresh()

        def check(at: int) -> None:
            assert version_of(f"new {at}", reader.get(f"new {at}")) == at
            assert version_of("a", reader.get("a")) == at
            assert reader.stats()["blobs"] == len(reader)
            assert reader.catalog.records.lock.acquire(blocking=False)
            reader.catalog.records.lock.release()

        places = interrupted_everywhere(lambda at: put(writer, at), use, check, STEP)
    assert places > 20


def test_a_sequence_that_is_interrupted_goes_on(folder, writer):
    written = prompt(writer, "s", 60)
    with open_reader(folder, engine="pagecache") as reader:
        found = reader.sequence("s", SHAPE)

        def change(at: int) -> None:
            written.truncate(60)
            for layer in range(SHAPE.layers):
                k, v = written.read(layer, tokens=slice(0, 5))
                written.append(layer, k, v)
            writer.flush()
            reader.refresh()

        def check(_: int) -> None:
            assert found.tokens() == 65
            assert found.read(0)[0].shape[2] == 65

        places = interrupted_everywhere(change, lambda _: found.read(1), check, 7 * STEP)
        assert places > 20
        assert len(reader._open_sequences._restored) <= 3
    writer.sequence("s").truncate(60)
    writer.flush()
    with open_reader(folder) as reader:
        assert same_tokens(reader.sequence("s"), 60)


def test_an_opening_and_a_closing_that_are_interrupted_leave_nothing_held(folder, writer):
    put(writer, 0)
    readers = []

    def live(_: int) -> None:
        readers.clear()
        readers.append(open_reader(folder, engine="pagecache"))
        readers[0].close()

    def check(at: int) -> None:
        for reader in readers:
            reader.close()
        readers.clear()
        put(writer, at)
        with open_reader(folder, engine="pagecache") as reader:
            assert version_of("a", reader.get("a")) == at

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of readers that nobody closed
        places = interrupted_everywhere(lambda _: None, live, check, 11 * STEP)
    assert places > 100
    try:
        writer.close()
    except SpdkKvError as failed:
        pytest.fail(str(failed))
    assert not descriptors._users
    assert not descriptors._left
