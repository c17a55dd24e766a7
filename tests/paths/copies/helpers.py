"""Stores whose page cache is a medium of its own, on drives that tests can have everywhere."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paths.helpers import MIB, PLENTY, open_dual, units
from spdk_kv.engines.pagecache.copies import check_page_cache_dir
from spdk_kv.errors import EngineUnavailable
from spdk_kv.store import KVStore
from spdk_kv.store import paths as store_paths
from support import blockdev
from support.waiting import PATIENCE_S

DRIVE_NBYTES = 64 * MIB


@contextlib.contextmanager
def folder_for_copies() -> Iterator[Path]:
    """A folder on a drive: the usual one for temporary files may be memory."""
    for where in (None, "/var/tmp", "."):
        with tempfile.TemporaryDirectory(prefix="spdk_kv-test-", dir=where) as made:
            try:
                check_page_cache_dir(made)
            except EngineUnavailable:
                continue
            yield Path(made)
            return
    pytest.skip("no folder on a drive to keep copies in")


class CopyPlace:
    """A drive that the page cache is not of, and a folder for copies.

    ``lasting``: it can be opened again. ``image``: its bytes as a file, or None.
    """

    def __init__(
        self, uri: str, copies: Path, index: Path | None = None, image: Path | None = None
    ) -> None:
        self.uri = uri
        self.copies = copies
        self.index = index
        self.image = image
        self.created = False

    @property
    def lasting(self) -> bool:
        return self.index is not None

    def open(self, available: int = PLENTY, **options: Any) -> KVStore:
        wanted: dict[str, Any] = {"folder": self.copies}
        if self.index is not None:
            wanted |= {"capacity": None, "index_dir": self.index, "create": not self.created}
            self.created = True
        return open_dual(self.uri, available, **(wanted | options))


@contextlib.contextmanager
def on_memory() -> Iterator[CopyPlace]:
    """Copies of what is in memory: on any machine, whoever runs the tests."""
    with folder_for_copies() as copies:
        yield CopyPlace("ram://", copies)


@contextlib.contextmanager
def on_loop_device() -> Iterator[CopyPlace]:
    """A loop device, taken for a drive that the page cache does not reach: with a bypassing
    engine as good as one, and its image can be made to fail."""
    with folder_for_copies() as copies, pytest.MonkeyPatch.context() as patched:
        patched.setattr(store_paths, "_COHERENT", ())
        image = copies / "image"
        with image.open("wb") as file:
            file.truncate(DRIVE_NBYTES)
        with blockdev.loop_device(image) as node:
            yield CopyPlace(f"block://{node}", copies, copies / "index", image)


def waited(store: KVStore, until: Callable[[], bool] | None = None) -> None:
    """Waits until nothing is being copied, and nothing of what was forgotten is left."""
    copy = store.paths.routes.copy
    assert copy is not None
    end = time.monotonic() + PATIENCE_S
    while copy._held_nbytes or copy._holes or (until is not None and not until()):
        assert time.monotonic() < end
        time.sleep(0.001)


def fully(store: KVStore, sequence: Any, reference: Any) -> None:
    """Turns until all that is on the page-cache path is copied."""
    for _ in range(50):
        reference.check(sequence)
        waited(store)
        if all(unit.served_nbytes == unit.nbytes for unit in units(store) if unit.cached):
            return
    pytest.fail("what is on the page-cache path is never all copied")


def copied(store: KVStore) -> list[int]:
    """Bytes of each unit that are read from the copy."""
    return [unit.served_nbytes if unit.cached else 0 for unit in units(store)]


def on_disk_nbytes(store: KVStore) -> int:
    """What the copies take of their drive, or will when it is written."""
    assert store.paths.routes.cache is not None
    return os.fstat(store.paths.routes.cache.fd).st_blocks * 512


def copy_path(store: KVStore) -> str:
    """The unnamed file of the copies, as this process may open it."""
    assert store.paths.routes.cache is not None
    return f"/proc/self/fd/{store.paths.routes.cache.fd}"


def damage(store: KVStore, nbytes: int = 64) -> None:
    """Changes bytes of every unit in the copy."""
    assert store.paths.routes.cache is not None
    for unit in units(store):
        for offset, _ in unit.extents:
            os.pwrite(store.paths.routes.cache.fd, b"\xa5" * nbytes, offset + 4096)


def deleted(store: KVStore, sequence: Any) -> None:
    """Deletes it, and waits until its extents can have another owner."""
    sequence.delete()
    store.flush()
    while not store.catalog.quarantine.is_empty:  # writes that were cut short
        time.sleep(0.001)
        store.flush()


@pytest.fixture(params=["memory", "loop"])
def place_fixture(request: pytest.FixtureRequest) -> Iterator[CopyPlace]:
    with {"memory": on_memory, "loop": on_loop_device}[request.param]() as drive:
        yield drive
