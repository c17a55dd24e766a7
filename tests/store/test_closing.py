"""Ctrl-C in close(): a second one goes on where the first was interrupted, and everything is given
back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch

import spdk_kv
from spdk_kv.errors import ClosedError, DeviceError
from spdk_kv.store.closing import Closing
from store.helpers import (
    check_books,
    folder_fixture,
    noise,
    open_store,
    payload,
    reopen,
    version_of,
)
from support import blockdev
from support.interrupts import interrupted_everywhere
from support.rounds import rounds
from support.subprocesses import interruptible_fixture
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture
interruptible = interruptible_fixture
SHAPE = spdk_kv.KVShape(1, 1, 64, torch.float16, 100)


def descriptors(of: str) -> list[str]:
    """Where this process's descriptors point, those that name ``of``."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [path for path in found if of in path]


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
def test_ctrl_c_anywhere_in_close_and_a_second_one_gives_everything_back(folder, engine):
    stores: list[spdk_kv.KVStore] = []
    last = -1

    def prepare(at: int) -> None:
        nonlocal last
        store = open_store(folder, engine=engine)
        if last >= 0:
            assert version_of("k", store.get("k")) == last
            assert store.sequence("s").tokens() > 0
        k = torch.ones(1, 1, 1, 64, dtype=torch.float16)
        if "s" in store.sequences():
            store.sequence("s").delete()
        store.sequence("s", SHAPE).append(0, k, k)
        store.sequence("t", SHAPE, temporary=True).append(0, k, k)
        store.put("k", payload("k", at, 20_000))
        last = at
        stores[:] = [store]

    def check(at: int) -> None:
        with suppress(ClosedError):  # nothing had begun where the interrupt came first
            assert version_of("k", stores[0].get("k")) == at
        stores[0].close()
        with pytest.raises(ClosedError):
            stores[0].get("k")
        stores[0].close()
        assert descriptors(str(folder)) == []

    assert interrupted_everywhere(prepare, lambda at: stores[0].close(), check, rounds(23, 1)) > 60
    with reopen(folder) as store:
        assert store.sequences() == ["s"]
        check_books(store)


def test_ctrl_c_while_close_waits_for_a_callback(tmp_path, interruptible):
    """As `interrupted_close_releases` of the reviews: the engine's own thread is what is slow."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    with blockdev.loop_device(image) as node:
        options = {"create": True, "index_dir": tmp_path / "index"}
        store = open_store(f"block://{node}", **options)
        begun, over = threading.Event(), threading.Event()

        def wait_there(_: object) -> None:
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                over.wait(PATIENCE_S)

        while not begun.wait(0.05):  # on this thread where the put was done before it was asked for
            store.put_async("a", noise(1000)).add_done_callback(wait_there)

        def interrupt() -> None:
            wait_until(lambda: store._closed and store.engine._closed)
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                store.close()
        finally:
            interrupter.join()
            over.set()
        store.close()
        with open_store(f"block://{node}", **options) as store:
            assert "a" in store


def test_an_error_keeps_no_later_step_from_being_done_and_is_raised_once():
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        raise DeviceError("no")

    closing = Closing(lambda: done.append(0), fail, lambda: done.append(2))
    with pytest.raises(DeviceError, match="no"):
        closing.run()
    assert closing.is_over()
    closing.run()
    assert done == [0, 1, 2]


def test_a_store_left_open_at_exit_is_closed_without_a_word(tmp_path):
    """Also where the page cache holds layers of a sequence, which are to be dropped from it."""
    code = """
import sys
import torch
import spdk_kv

path = spdk_kv.PageCacheOptions(memory="64 MiB")
store = spdk_kv.open(sys.argv[1], capacity="16 MiB", page_cache=path)
sequence = store.sequence("left", spdk_kv.KVShape(1, 2, 64, torch.float32), temporary=True)
new = torch.ones(1, 2, 512, 64)
for _ in range(3):
    sequence.append(0, new, new)
    sequence.settle(0)
    sequence.read(0)
assert store.stats()["residency"]["cached_units"] == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"file://{tmp_path}/kv"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
