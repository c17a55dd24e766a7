"""Blobs that go with a sequence are gone with it, and with no other one."""

from __future__ import annotations

from pathlib import Path

import torch

from spdk_kv.store import SLOTS, companion_key
from spdk_kv.store import open as open_store
from spdk_kv.types import KVShape

SHAPE = KVShape(2, 2, 64, torch.float16, None)


def test_they_are_deleted_with_their_sequence(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/kv", capacity="4 MiB") as store:
        for name in ("a", "b"):
            store.sequence(name, SHAPE)
            for slot in range(SLOTS):
                store.put(companion_key(name, slot), torch.zeros(9))
        store.flush()
        store.sequence("a").delete()
        assert store.keys() == [companion_key("b", slot) for slot in range(SLOTS)]
        store.sequence("a", SHAPE).delete()  # one that was never recorded
    with open_store(f"file://{tmp_path}/kv") as store:
        assert sorted(store.keys()) == [companion_key("b", slot) for slot in range(SLOTS)]
        store.sequence("b").delete()
        assert store.keys() == []
        store.flush()
    with open_store(f"file://{tmp_path}/kv") as store:
        assert store.keys() == []
