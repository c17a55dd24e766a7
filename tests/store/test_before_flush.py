"""What is put right before a flush goes with it, and what fails keeps nothing back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from spdk_kv.errors import DeviceTimeout
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from support.waiting import PATIENCE_S


class Putter:
    """Puts its number of calls."""

    def __init__(self, store: KVStore) -> None:
        self.store, self.calls = store, 0

    def put(self, timeout_s: float | None) -> None:
        self.calls += 1
        self.store.put("calls", torch.tensor([self.calls]), timeout_s=timeout_s)

    def fail(self, timeout_s: float | None) -> None:
        self.calls += 1
        raise DeviceTimeout("no")


def opened(tmp_path: Path) -> KVStore:
    return open_store(f"file://{tmp_path}/kv", capacity="4 MiB", flush_interval_s=None)


def test_what_a_call_puts_goes_with_the_flush_and_with_close(tmp_path: Path) -> None:
    store = opened(tmp_path)
    putter = Putter(store)
    store.before_flush.add(putter.put)
    store.flush()
    assert store.get("calls").item() == 1
    assert not store.dirty
    store.close()
    store.close()
    assert putter.calls == 2
    with opened(tmp_path) as again:
        assert again.get("calls").item() == 2


def test_a_call_that_fails_is_logged_and_keeps_nothing_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as store:
        failing, putter = Putter(store), Putter(store)
        store.before_flush.add(failing.fail)
        store.before_flush.add(putter.put)
        store.flush(timeout_s=PATIENCE_S)
        assert (failing.calls, putter.calls) == (1, 1)
        assert not store.dirty
    assert "before a flush" in caplog.text


def test_a_call_ends_with_its_object_or_when_it_is_removed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        kept, dropped = Putter(store), Putter(store)
        for each in (kept, dropped):
            store.before_flush.add(each.put)
        del dropped, each
        gc.collect()
        store.flush()
        assert store.get("calls").item() == kept.calls == 1
        store.before_flush.remove(kept.put)
        store.before_flush.remove(kept.put)
        store.flush()
        assert kept.calls == 1
