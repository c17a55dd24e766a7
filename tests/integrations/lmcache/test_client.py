"""The client without its host: what is loaded is what was stored, and every batch ends once."""

from __future__ import annotations

import errno
import os
import select
import threading
import traceback

import pytest

import spdk_kv
from integrations.lmcache.driving import content, exists, get, put, views, wait_for
from spdk_kv.integrations.lmcache import Client
from support.rounds import LONG
from support.waiting import in_use, wait_until

SMALL = {"depth": 4, "segment": "64 KiB", "staging": "8 MiB"}
ODD = ["", "a/../b", "m@00000001@0@ff@ü\n\0", "x" * 1024, "'; DROP TABLE blobs; --"]


def opened(folder, **params) -> Client:
    given = {"location": f"file://{folder}/kv", "capacity": "16 MiB", "engine": SMALL}
    return Client(**(given | params))


@pytest.fixture
def client(tmp_path):
    client = opened(tmp_path)
    yield client
    client.close()


def test_any_key_and_any_length_comes_back(client):
    lengths = (0, 1, 4095, 4096, 1_000_003)
    pages = {key: content(at, lengths[at]) for at, key in enumerate(ODD)}
    assert put(client, pages)[1:] == (True, "", None)
    found, places = get(client, {key: len(page) for key, page in pages.items()})
    assert found == [True] * len(pages)
    assert places == list(pages.values())


def test_memory_that_is_not_aligned_comes_back(client):
    memory, place = content(1, 3 << 20), bytearray(3 << 20)
    starts = [(1, 100_001), (200_003, 4096), (300_000, 1 << 20)]
    for at, (start, nbytes) in enumerate(starts):
        view = memoryview(memory)[start : start + nbytes]
        assert wait_for(client, client.submit_batch_set([f"k{at}"], [view]))[0][1]
    for at, (start, nbytes) in enumerate(starts):
        view = memoryview(place)[start : start + nbytes]
        assert wait_for(client, client.submit_batch_get([f"k{at}"], [view]))[0][3] == [True]
        assert place[start : start + nbytes] == memory[start : start + nbytes]
    filled = bytearray(3 << 20)
    for start, nbytes in starts:
        filled[start : start + nbytes] = memory[start : start + nbytes]
    assert place == filled, "bytes beside the views have changed"


def test_a_key_that_is_there_is_replaced(client):
    put(client, {"k": content(1, 5000)})
    put(client, {"k": content(2, 7000)})
    assert get(client, {"k": 7000}) == ([True], [content(2, 7000)])


def test_another_length_is_a_miss_and_fills_nothing(client):
    put(client, {"k": content(1, 8192), "l": content(2, 100)})
    found, places = get(client, {"k": 8191, "l": 100, "none": 5})
    assert found == [False, True, False]
    assert places == [b"\xa5" * 8191, content(2, 100), b"\xa5" * 5]


def test_of_another_identity_nothing_is_found(tmp_path):
    client = opened(tmp_path, identity="bfloat16")
    put(client, {"k": content(1, 64)})
    client.close()
    client = opened(tmp_path, identity="float16")
    assert exists(client, ["k"]) == [False]
    assert get(client, {"k": 64})[0] == [False]
    assert wait_for(client, client.submit_batch_delete(["k"]))[0][3] == [False]
    client.close()
    client = opened(tmp_path, identity="bfloat16")
    assert wait_for(client, client.submit_batch_delete(["k"]))[0][3] == [True]
    assert exists(client, ["k"]) == [False]
    client.close()


def test_an_identity_and_a_name_are_not_read_as_others(tmp_path):
    # As one text they would be the same.
    for at, (identity, key) in enumerate((("", "a/b/c@0"), ("a", "b/c@0"), ("a/b", "c@0"))):
        client = opened(tmp_path, identity=identity)
        assert exists(client, [key]) == [False]
        put(client, {key: content(at, 64)})
        client.close()


def test_a_fork_touches_nothing_of_its_parents(client):
    page = memoryview(b"x")
    with in_use(client._lock), in_use(client._fd_lock):
        pid = os.fork()
        if not pid:
            try:
                for ask in (
                    lambda: client.submit_batch_set(["k"], [page]),
                    lambda: client.submit_batch_get(["k"], [memoryview(bytearray(1))]),
                    lambda: client.submit_batch_exists(["k"]),
                    client.drain_completions,
                ):
                    with pytest.raises(spdk_kv.ClosedError, match="fork"):
                        ask()
                client.close()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    assert put(client, {"k": page})[1]


def test_a_start_that_fails_leaves_the_store_to_the_next(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd", refused)
        with pytest.raises(OSError, match="too many") as failed:
            opened(tmp_path)
    assert failed.value.errno == errno.EMFILE  # and its frames are alive
    opened(tmp_path).close()


def test_deletes_say_what_there_was(client):
    put(client, {"a": content(1, 10), "b": content(2, 10)})
    assert exists(client, ["a", "x", "b"]) == [True, False, True]
    assert wait_for(client, client.submit_batch_delete(["a", "x"]))[0][1:] == (
        *(True, ""),
        [True, False],
    )
    assert exists(client, ["a", "b"]) == [False, True]


def test_the_descriptor_is_readable_while_something_has_ended_and_only_then(client):
    poller = select.poll()
    poller.register(client.event_fd(), select.POLLIN)
    assert client.drain_completions() == []
    assert poller.poll(0) == []
    numbers = [client.submit_batch_exists(["a"]) for _ in range(3)]
    assert poller.poll(0)
    assert [number for number, *_ in client.drain_completions()] == numbers
    assert poller.poll(0) == []
    assert not os.get_inheritable(client.event_fd())


def test_many_batches_at_once_each_end_once(client):
    pages = [{f"{batch}/{at}": content(at, 3000 + batch) for at in range(5)} for batch in range(20)]
    numbers: dict[int, list[int]] = {}

    def submit(part: int) -> None:
        numbers[part] = [
            client.submit_batch_set(list(batch), views(batch.values())) for batch in pages[part::4]
        ]

    threads = [threading.Thread(target=submit, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [number for part in numbers.values() for number in part]
    assert len(set(every)) == 20
    assert all(ok for _, ok, _, _ in wait_for(client, *every))
    assert not client._sets, "something is kept of batches that have ended"
    for batch in pages:
        assert get(client, {key: len(page) for key, page in batch.items()}) == (
            [True] * 5,
            list(batch.values()),
        )


def test_what_was_stored_is_there_after_a_restart_and_counts(tmp_path):
    client = opened(tmp_path)
    pages = {f"k{at}": content(at, 1 << 20) for at in range(6)}
    put(client, pages)
    used = client.store.stats()["used_nbytes"]
    client.close()
    client = opened(tmp_path, capacity=None)
    assert client.store.stats()["used_nbytes"] == used >= 6 << 20
    assert get(client, dict.fromkeys(pages, 1 << 20)) == ([True] * 6, list(pages.values()))
    # What it had before counts: there is room for ten more of them in 16 MiB, not for sixteen.
    put(client, {f"n{at}": content(at, 1 << 20) for at in range(10)})
    put(client, {f"o{at}": content(at, 1 << 20) for at in range(4)})
    assert client.store.stats()["used_nbytes"] <= 16 << 20
    assert client.store.stats()["evictions"] >= 4
    client.close()


def test_nothing_of_the_hosts_memory_is_held_after_a_batch(client):
    page, place = content(1, 100_000), bytearray(100_000)
    wait_for(client, client.submit_batch_set(["k"], [memoryview(page)]))
    wait_for(client, client.submit_batch_get(["k"], [memoryview(place)]))
    # Refused while something holds an export.
    page.append(0)
    place.append(0)


def test_closed_with_batches_under_way_nothing_is_held(tmp_path):
    client = opened(tmp_path, workers=2)
    pages = [content(at, 100_000) for at in range(8)]
    place = bytearray(100_000)
    with in_use(client.store._records.lock):
        for at, page in enumerate(pages):
            client.submit_batch_set([f"k{at}"], [memoryview(page)])
        client.submit_batch_get(["k0"], [memoryview(place)])
        closer = threading.Thread(target=client.close)
        closer.start()
        # Of what was not begun the memory is free at once; for the rest it waits.
        wait_until(lambda: not client._jobs._puts)
    closer.join()
    for memory in [*pages, place]:
        memory.append(0)
    assert len(client.drain_completions()) == 9


def test_after_close_nothing_is_taken_and_no_foreign_descriptor_touched(tmp_path):
    client = opened(tmp_path)
    client.close()
    # The number is another file's by now.
    taken = os.eventfd(7)
    os.dup2(taken, client.event_fd())
    try:
        client.close()
        assert client.drain_completions() == []
        for submit in (client.submit_batch_set, client.submit_batch_get):
            with pytest.raises(spdk_kv.ClosedError):
                submit(["k"], [memoryview(bytearray(5))])
        for ask in (client.submit_batch_exists, client.submit_batch_delete):
            with pytest.raises(spdk_kv.ClosedError):
                ask(["k"])
        assert os.eventfd_read(taken) == 7
    finally:
        os.close(taken)
        os.close(client.event_fd())


def test_more_keys_than_views_are_refused(client):
    with pytest.raises(ValueError, match="zip"):
        client.submit_batch_set(["a", "b"], [memoryview(b"x")])


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"capcity": "1 GiB"},
            r"no option 'capcity' \(did you mean 'capacity'\?\); there are location, capacity",
        ),
        ({"location": ""}, '"location" is needed'),
        ({"location": 5}, '"location" is needed'),
        ({"identity": 5}, "identity is text"),
        ({"workers": 1}, "workers is 2 or more"),
        ({"eviction": "fifo"}, "eviction is 'slru', 'lru' or 'none'"),
        ({"engine": {"dept": 5}}, "dept"),
        ({"capacity": "much"}, "much"),
    ],
)
def test_what_cannot_be_set_is_refused_with_the_reason(tmp_path, params, said):
    with pytest.raises((TypeError, ValueError), match=said):
        opened(tmp_path, **params)


@pytest.mark.long
def test_a_value_of_a_gigabyte_and_a_half(tmp_path):
    assert LONG
    nbytes = (3 << 29) + 1
    client = opened(tmp_path, capacity="2 GiB", engine=None)
    page = content(1, nbytes)
    assert put(client, {"k": page})[1]
    found, (place,) = get(client, {"k": nbytes})
    assert found == [True]
    assert place == page
    client.close()
