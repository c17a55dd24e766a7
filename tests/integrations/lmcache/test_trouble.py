"""Trouble that a client meets, really caused: every batch ends, nobody waits for the drive, and
what is loaded is what was stored."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from integrations.lmcache.driving import content, exists, get, put, views, wait_for
from integrations.lmcache.test_client import SMALL, opened
from spdk_kv.errors import StoreLocked
from spdk_kv.integrations.lmcache import Client
from store.helpers import check_books, extent_of, flip
from support import blockdev
from support.places import TESTS
from support.subprocesses import run_script
from support.waiting import PATIENCE_S

NBYTES = 200_000
_LOOP_CLR_FD = 0x4C01

CHILD = """
import sys
sys.path[:0] = [sys.argv[2]]
from itertools import count
from integrations.lmcache.driving import content, put, views, wait_for
from spdk_kv.integrations.lmcache import Client

client = Client(location=f"file://{sys.argv[1]}/kv", capacity="64 MiB", flush_interval_s=0.05)
for turn in count():
    pages = {f"turn {turn * 8 + at}": content(turn * 8 + at, 200_000) for at in range(8)}
    number = client.submit_batch_set(list(pages), views(pages.values()))
    if turn >= 4:
        print(turn, flush=True)  # while it is stored
    wait_for(client, number)
    if turn == 3:
        client.store.flush()
"""


def test_killed_in_a_store_the_next_one_finds_exact_bytes_or_nothing(tmp_path):
    for kill in range(3):
        folder = tmp_path / str(kill)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(TESTS)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for _ in range(2 + kill):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait(PATIENCE_S)
        child.stdout.close()
        client = Client(location=f"file://{folder}/kv")
        turns = {f"turn {number}": NBYTES for number in range(200)}
        there, places = get(client, turns)
        assert there == exists(client, list(turns))
        for number, is_there in enumerate(there):
            assert not is_there or places[number] == content(number, NBYTES)
        assert all(there[:32]), "what was flushed is not there"
        check_books(client.store)
        client.close()


def test_full_and_all_of_it_in_use_nothing_is_stored_and_the_host_goes_on(tmp_path, caplog):
    client = opened(tmp_path, capacity="2 MiB")
    pages = {f"k{at}": content(at, NBYTES) for at in range(10)}
    assert put(client, pages)[1]
    held = client.store._records.find(client.store.keys())
    _, ok, error, _ = put(client, {"new": content(9, NBYTES), "newer": content(10, NBYTES)})
    assert (ok, error) == (False, "2 of 2 were not stored; see the log")
    assert "were not stored: " in caplog.text
    assert exists(client, ["new", "k0"]) == [False, True]
    assert get(client, {"k0": NBYTES}) == ([True], [content(0, NBYTES)])
    client.store._records.unpin(held)
    assert put(client, {"new": content(9, NBYTES)})[1]
    assert get(client, {"new": NBYTES}) == ([True], [content(9, NBYTES)])
    client.close()


def test_more_than_the_store_holds_in_one_batch_fails_and_leaves_the_rest_alone(tmp_path):
    client = opened(tmp_path, capacity="2 MiB")
    put(client, {"k": content(1, NBYTES)})
    assert not put(client, {"large": content(2, 3 << 20)})[1]
    assert get(client, {"k": NBYTES}) == ([True], [content(1, NBYTES)])
    client.close()


@pytest.fixture
def drive(tmp_path):
    """A client on a drive of 8 MiB of its own, and that drive."""
    with blockdev.hung_device(tmp_path, 8 << 20) as device:
        client = Client(
            location=f"block://{device.node}",
            create=True,
            index_dir=str(tmp_path / "index"),
            engine=SMALL,
            flush_interval_s=None,
            most_pending=20,
        )
        yield client, device
        device.thaw()
        client.close()


def test_a_drive_that_hangs_stops_no_call_and_what_waits_is_stored_in_the_end(drive, caplog):
    client, device = drive
    put(client, {"there": content(1, NBYTES)})
    device.freeze()
    pages = [content(at, NBYTES) for at in range(20)]
    numbers = [client.submit_batch_set([f"k{at}"], views([pages[at]])) for at in range(20)]
    # What is known, and what is too much, is answered all the same.
    known, gone = client.submit_batch_exists(["there"]), client.submit_batch_delete(["none"])
    declined = client.submit_batch_set(["more"], views([content(9, 5)]))
    ends = wait_for(client, known, gone, declined)
    assert [end[1] for end in ends] == [True, True, False]
    assert ends[2][2] == "20 jobs are waiting"
    assert "1 pages were not stored: 20 jobs are waiting" in caplog.text
    assert [end[3] for end in ends[:2]] == [[True], [False]]
    device.thaw()
    assert all(end[1] for end in wait_for(client, *numbers))
    assert get(client, {"there": NBYTES, "k19": NBYTES}) == (
        [True, True],
        [content(1, NBYTES), pages[19]],
    )


def test_a_slow_drive_holds_up_no_call(tmp_path, monkeypatch):
    client = opened(tmp_path)
    pages = {f"k{at}": content(at, NBYTES) for at in range(12)}
    put(client, pages)
    run, gate, begun = client.store.engine.run, threading.Semaphore(0), threading.Semaphore(0)

    def slow(transfer, timeout_s=None):
        begun.release()
        assert gate.acquire(timeout=PATIENCE_S)
        run(transfer, timeout_s)

    monkeypatch.setattr(client.store.engine, "run", slow)
    places = {key: bytearray(NBYTES) for key in pages}
    numbers = {client.submit_batch_get([key], views([places[key]])): key for key in pages}
    assert begun.acquire(timeout=PATIENCE_S)
    assert exists(client, ["k0", "none"]) == [True, False]
    poller = select.poll()
    poller.register(client.event_fd(), select.POLLIN)
    ended = []
    while len(ended) < 12:  # the drive lets one through at a time
        gate.release()
        assert poller.poll(PATIENCE_S * 1000)
        ended += client.drain_completions()
    assert {number for number, *_ in ended} == set(numbers)
    assert all(found == [True] for *_, found in ended)
    assert places == pages
    monkeypatch.undo()
    client.close()


@pytest.fixture
def gone(tmp_path):
    """A descriptor of a drive that was taken away."""
    with open(tmp_path / "image", "wb") as file:
        file.truncate(1 << 20)
    with blockdev.loop_device(tmp_path / "image") as node:
        fd = os.open(node, os.O_RDWR | os.O_DIRECT)
        until = time.monotonic() + PATIENCE_S
        with suppress(OSError):  # as wanted; sooner, somebody else may have it open, too
            while time.monotonic() < until:
                fcntl.ioctl(fd, _LOOP_CLR_FD)
                time.sleep(0.01)
        yield fd
        os.close(fd)


def test_a_drive_that_is_gone_is_misses_and_failed_stores(tmp_path, gone):
    # An engine that names its descriptor in every call, so that another drive can be put there.
    client = opened(tmp_path, engine=SMALL | {"name": "threads"}, flush_interval_s=None)
    put(client, {"a": content(1, NBYTES), "b": content(2, NBYTES)})
    os.dup2(gone, client.store.engine.fd)
    assert get(client, {"a": NBYTES, "b": NBYTES})[0] == [False, False]
    _, ok, error, _ = put(client, {"c": content(3, NBYTES)})
    assert (ok, error) == (False, "1 of 1 were not stored; see the log")
    assert exists(client, ["c"]) == [False]
    client.close()


def test_a_damaged_entry_is_a_miss_and_counted(tmp_path):
    client = opened(tmp_path)
    put(client, {"a": content(1, NBYTES), "b": content(2, NBYTES)})
    client.store.flush()
    offset, nbytes = extent_of(client.store, "a")
    flip(tmp_path / "kv" / "data", offset + nbytes - 1)
    found, places = get(client, {"a": NBYTES, "b": NBYTES})
    assert found == [False, True]
    assert places[1] == content(2, NBYTES)
    assert client.store.stats()["corruptions"] == 1
    assert exists(client, ["a"]) == [False]
    client.close()


def test_a_second_engine_is_told_who_has_the_folder_or_reads_beside_it(tmp_path, caplog):
    client = opened(tmp_path)
    put(client, {"a": content(1, NBYTES)})
    client.store.flush()
    with pytest.raises(StoreLocked, match=str(os.getpid())):
        opened(tmp_path)
    run_script(f"""
        import os
        from spdk_kv.errors import StoreLocked
        from spdk_kv.integrations.lmcache import Client
        try:
            Client(location="file://{tmp_path}/kv")
        except StoreLocked as locked:
            assert locked.pid == os.getppid(), locked
        else:
            raise SystemExit("it was opened twice")
    """)
    reader = opened(tmp_path, read_only=True, capacity=None)
    assert get(reader, {"a": NBYTES, "b": NBYTES}) == (
        [True, False],
        [content(1, NBYTES), b"\xa5" * NBYTES],
    )
    assert not put(reader, {"b": content(2, NBYTES)})[1]
    assert "read_only" in caplog.text
    # What is stored by the other one meanwhile is found after its flush.
    put(client, {"b": content(2, NBYTES)})
    client.store.flush()
    assert exists(reader, ["b"]) == [True]
    assert get(reader, {"b": NBYTES}) == ([True], [content(2, NBYTES)])
    reader.close()
    client.close()
