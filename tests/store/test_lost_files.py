"""Files of a store that are removed, replaced or moved while it is open: no flush says done."""

from __future__ import annotations

import os
import shutil

import pytest

from spdk_kv.errors import DeviceGone, SpdkKvError
from store.helpers import folder_fixture, noise, open_store, reopen
from support import blockdev

folder = folder_fixture

FILES = ["data", "index.sqlite", "index.sqlite-wal", "index.sqlite-commits", "lock"]


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_removed_file_is_noticed_by_the_next_flush_and_by_close(folder, name, pending):
    store = open_store(folder)
    store.put("a", noise(100))
    store.flush()
    (folder / name).unlink()
    if pending:
        store.put("b", noise(100))
    for _ in range(2):
        with pytest.raises(DeviceGone, match=rf"{name} was removed or renamed"):
            store.flush()
    assert store.get("a").shape == (100,)
    with pytest.raises(DeviceGone, match=name):
        store.close()


@pytest.mark.parametrize("name", ["data", "index.sqlite"])
def test_a_file_that_was_replaced_is_noticed(folder, name):
    store = open_store(folder)
    store.put("a", noise(100))
    store.flush()
    shutil.copy(folder / name, folder / "copy")
    os.replace(folder / "copy", folder / name)
    with pytest.raises(DeviceGone, match=f"{name} was replaced"):
        store.flush()
    with pytest.raises(DeviceGone):
        store.close()


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_is_gone_is_noticed(folder, how):
    store = open_store(folder / "kv")
    store.put("a", noise(100))
    store.flush()
    if how == "removed":
        shutil.rmtree(folder / "kv")
    else:
        (folder / "kv").rename(folder / "moved")
    store.put("b", noise(100))
    with pytest.raises(DeviceGone, match="was removed or renamed"):
        store.flush()
    if how == "renamed":  # and put back
        (folder / "moved").rename(folder / "kv")
        store.flush()
        store.close()
        with reopen(folder / "kv") as store:
            assert store.keys() == ["a", "b"]
    else:
        with pytest.raises(SpdkKvError):
            store.close()


def test_a_put_that_needs_room_notices_too(folder):
    store = open_store(folder, capacity="1 MiB")
    store.put("a", noise(1 << 20))
    store.flush()
    (folder / "data").unlink()
    with pytest.raises(DeviceGone):
        store.put("b", noise(1 << 20))
    with pytest.raises(DeviceGone):
        store.close()


def test_a_store_on_a_device_node_needs_only_its_index(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    with blockdev.loop_device(image) as node:
        options = {"index_dir": tmp_path / "index", "capacity": None}
        store = open_store(f"block://{node}", create=True, **options)
        store.put("a", noise(100))
        store.flush()
        (tmp_path / "index" / "index.sqlite").unlink()
        with pytest.raises(DeviceGone, match=r"index\.sqlite"):
            store.flush()
        with pytest.raises(DeviceGone):
            store.close()
