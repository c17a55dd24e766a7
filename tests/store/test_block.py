"""A store on a block device: begun only on a blank one, and only when asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdk_kv.errors import CapacityError, CorruptionError, DeviceError, StoreLocked, StoreMismatch
from spdk_kv.index import Index
from spdk_kv.placement import superblock
from spdk_kv.placement.superblock import COPY_OFFSETS
from spdk_kv.store.superblocks import _MOST_DAMAGED_NBYTES, refuse_if_written_over
from store.helpers import check_books, flip, open_store, payload, reopen, sha256, version_of
from support import blockdev

MIB = 1 << 20


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(24 * MIB)
    return path


@pytest.fixture(params=["loop", "partition"])
def node(request, image) -> Iterator[str]:
    made = blockdev.partition if request.param == "partition" else blockdev.loop_device
    with made(image) as found:
        yield found


def open_block(node: str, tmp_path: Path, **options):
    wanted = {"index_dir": tmp_path / "index", "capacity": None} | options
    return open_store(f"block://{node}", **wanted)


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
def test_a_store_on_a_device_lasts(node, tmp_path, engine):
    with pytest.raises(StoreMismatch, match="create=True"):
        open_block(node, tmp_path)
    # The lock comes before the device is touched; nothing else is begun.
    assert not (tmp_path / "index" / "index.sqlite").exists()
    with open_block(node, tmp_path, create=True, engine=engine) as store:
        assert store.stats()["capacity_nbytes"] >= 22 * MIB  # all of it but the superblocks
        for i in range(10):
            store.put(str(i), payload(str(i), 1, MIB))
        uuid = store.uuid
    with open_block(node, tmp_path) as store:
        assert store.uuid == uuid
        for i in range(10):
            assert version_of(str(i), store.get(str(i))) == 1
        for i in range(30):
            store.put(f"more {i}", payload(f"more {i}", 1, MIB))
        assert store.stats()["evictions"] > 0
        check_books(store)


def test_a_foreign_filesystem_is_refused_and_unchanged(image, tmp_path):
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    before = sha256(image)
    with blockdev.loop_device(image) as node:
        for create in (True, False, None):
            with pytest.raises((StoreMismatch, CorruptionError)):
                open_block(node, tmp_path, create=create)
        subprocess.run(["blockdev", "--flushbufs", node], check=True)
    assert sha256(image) == before


@pytest.mark.parametrize("maker", ["ext4", "gpt", "garbage"])
def test_what_was_made_over_a_store_is_not_taken_for_a_damaged_one(image, tmp_path, maker):
    with blockdev.loop_device(image) as node:
        with open_block(node, tmp_path, create=True) as store:
            store.put("k", payload("k", 1))
        if maker == "ext4":
            subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", node], check=True)
        else:
            # What a partition table leaves of the first sector may be our magic.
            written = b"EFI PART" if maker == "gpt" else b"xfs!"
            with open(node, "r+b") as device:
                device.seek(512)
                device.write((written + bytes(range(1, 93)))[:92])
    kept = image.read_bytes()[COPY_OFFSETS[1] :][:4096]
    assert superblock.parse(kept)  # the second copy is still good
    before = sha256(image)
    with (
        blockdev.loop_device(image) as node,
        pytest.raises(StoreMismatch, match="something else was written"),
    ):
        open_block(node, tmp_path, create=True)
    assert sha256(image) == before


@pytest.mark.parametrize("at", [8 << 10, MIB - 1, 24 * MIB - 1])
def test_anything_but_zeroes_at_either_end_is_refused_and_unchanged(image, tmp_path, at):
    flip(image, at)  # a signature that nobody knows, say
    before = sha256(image)
    with blockdev.loop_device(image) as node, pytest.raises((StoreMismatch, CorruptionError)):
        open_block(node, tmp_path, create=True)
    assert sha256(image) == before


def test_a_device_needs_room_for_one_block(image, tmp_path):
    os.truncate(image, MIB)
    with blockdev.loop_device(image) as node, pytest.raises(CapacityError, match="too small"):
        open_block(node, tmp_path, create=True)
    os.truncate(image, MIB + 4096)
    with (
        blockdev.loop_device(image) as node,
        open_block(node, tmp_path, create=True) as store,
    ):
        assert store.stats()["capacity_nbytes"] == 4096
        store.put("k", payload("k", 1, 4096))
        assert version_of("k", store.get("k")) == 1


def test_a_shrunk_device_is_refused_and_unchanged(image, tmp_path):
    with (
        blockdev.loop_device(image) as node,
        open_block(node, tmp_path, create=True) as store,
    ):
        store.put("k", payload("k", 1))
    smaller = tmp_path / "smaller"
    smaller.write_bytes(image.read_bytes()[: 12 * MIB])
    before = sha256(smaller)
    with (
        blockdev.loop_device(smaller) as node,
        pytest.raises(StoreMismatch, match=r"shrank|drive"),
    ):
        open_block(node, tmp_path)
    assert sha256(smaller) == before


def test_a_device_whose_index_is_elsewhere_is_refused(image, tmp_path):
    with blockdev.loop_device(image) as node:
        with open_block(node, tmp_path, create=True) as store:
            store.put("k", payload("k", 1))
        before = sha256(image)
        with pytest.raises(StoreMismatch, match="index_dir="):
            open_block(node, tmp_path, index_dir=tmp_path / "other", create=True)
        assert sha256(image) == before
        with open_block(node, tmp_path) as store:
            assert version_of("k", store.get("k")) == 1


def test_a_blank_device_beside_a_used_index_is_refused(image, tmp_path):
    with blockdev.loop_device(image) as node:
        open_block(node, tmp_path, create=True).close()
        with open(image, "r+b") as file:
            file.truncate(0)
            file.truncate(24 * MIB)
    # Neither answer advises what the other refuses.
    for create in (True, False):
        with (
            blockdev.loop_device(image) as node,
            pytest.raises(StoreMismatch, match=r"replaced or wiped.*remove .*index\.sqlite\*"),
        ):
            open_block(node, tmp_path, create=create)
    assert not any(image.read_bytes())
    for leftover in (tmp_path / "index").glob("index.sqlite*"):
        leftover.unlink()
    with blockdev.loop_device(image) as node:
        open_block(node, tmp_path, create=True).close()


@pytest.mark.parametrize("create", [True, False])
def test_create_is_not_advised_where_it_would_be_refused(image, tmp_path, create):
    with open(image, "r+b") as file:
        file.seek(64 << 10)  # as btrfs marks a drive, whose superblocks' places stay blank
        file.write(b"_BHRfS_M")
    before = sha256(image)
    with (
        blockdev.loop_device(image) as node,
        pytest.raises(StoreMismatch, match="is not blank within the MiB at offset 0"),
    ):
        open_block(node, tmp_path, create=create)
    assert sha256(image) == before


def test_a_store_whose_making_was_interrupted_is_begun_anew(image, tmp_path):
    (tmp_path / "index").mkdir()
    Index(tmp_path / "index" / "index.sqlite").close()
    with blockdev.loop_device(image) as node:
        with pytest.raises(StoreMismatch, match="pass create=True"):
            open_block(node, tmp_path)
        open_block(node, tmp_path, create=True).close()


def test_a_mounted_device_is_refused(image, tmp_path):
    with blockdev.loop_device(image) as node:
        open_block(node, tmp_path, create=True).close()
        subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True)
        (tmp_path / "at").mkdir()
        subprocess.run(["mount", node, str(tmp_path / "at")], check=True)
        try:
            with pytest.raises((StoreLocked, CorruptionError)):
                open_block(node, tmp_path)
        finally:
            subprocess.run(["umount", str(tmp_path / "at")], check=True)


def test_a_device_in_use_is_refused_though_it_holds_our_store(image, tmp_path):
    with blockdev.loop_device(image) as node, open_block(node, tmp_path, create=True) as store:
        store.put("k", payload("k", 1))
        store.flush()
        # Another folder of its own for the lock: the kernel's claim on the device still stands.
        (tmp_path / "twin").mkdir(mode=0o700)
        for name in ("index.sqlite", "index.sqlite-commits", "index.sqlite-wal"):
            (tmp_path / "twin" / name).write_bytes((tmp_path / "index" / name).read_bytes())
        with pytest.raises(StoreLocked, match="in use"):
            open_block(node, tmp_path, index_dir=tmp_path / "twin")
        assert version_of("k", store.get("k")) == 1


def test_one_superblock_copy_of_a_device_may_be_bad_and_two_not(image, tmp_path):
    with blockdev.loop_device(image) as node:
        open_block(node, tmp_path, create=True).close()
    flip(image, COPY_OFFSETS[0])
    with blockdev.loop_device(image) as node, open_block(node, tmp_path) as store:
        store.put("k", payload("k", 1))
    for offset in COPY_OFFSETS:
        flip(image, offset)
    before = sha256(image)
    with blockdev.loop_device(image) as node, pytest.raises(CorruptionError, match="superblock"):
        open_block(node, tmp_path, create=True)
    assert sha256(image) == before


@pytest.mark.parametrize("offset", COPY_OFFSETS)
def test_a_superblock_that_became_blank_is_written_anew(image, tmp_path, offset):
    with blockdev.loop_device(image) as node:
        with open_block(node, tmp_path, create=True) as store:
            store.put("k", payload("k", 1))
        with open(node, "r+b") as device:
            device.seek(offset)
            device.write(bytes(4096))
        with open_block(node, tmp_path) as store:
            assert version_of("k", store.get("k")) == 1
    assert superblock.parse(image.read_bytes()[offset : offset + 4096])


@pytest.mark.parametrize("blank", [0, 1])
def test_a_blank_superblock_is_nothing_else_that_was_written(blank):
    good = superblock.pack(superblock.Superblock("0f" * 16, 4096, MIB, 1, "x" * 100, ""))
    copies = [good, good]
    copies[blank] = bytes(len(good))
    assert good.count(0) < len(good) - _MOST_DAMAGED_NBYTES
    refuse_if_written_over("/dev/some", copies)


def test_what_is_no_block_device_is_a_typed_error(tmp_path):
    with pytest.raises(DeviceError):
        open_block("/dev/there-is-no-such-device", tmp_path, create=True)
    with pytest.raises(ValueError, match="index_dir"):
        open_store(f"file://{tmp_path}/kv", index_dir=tmp_path)
    with blockdev.loop_device(_file(tmp_path / "tiny", MIB)) as node, pytest.raises(CapacityError):
        open_block(node, tmp_path, create=True)


def _file(path: Path, nbytes: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(nbytes)
    return path


def test_reopen_keeps_what_the_helper_says(image, tmp_path):
    # The capacity asked for on a device is kept too.
    with blockdev.loop_device(image) as node:
        with open_block(node, tmp_path, create=True, capacity="8 MiB") as store:
            assert store.stats()["capacity_nbytes"] == 8 * MIB
        with reopen(f"block://{node}", index_dir=tmp_path / "index") as store:
            assert store.stats()["capacity_nbytes"] == 8 * MIB
        with pytest.raises(CapacityError, match="room for"):
            open_block(node, tmp_path, capacity="1 GiB")
