"""Opening a store to read it: data, superblock and index, and that they belong together.

No lock is taken and nothing is written, so that this works beside a writer, and where nobody can
write.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass

from spdk_kv.engines import Engine, Location, open_engine, parse_location
from spdk_kv.errors import CorruptionError, StoreMismatch
from spdk_kv.index import IndexReader, IndexSnapshot
from spdk_kv.placement import Allocator, Superblock, choose, parse_count
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.match import check_match
from spdk_kv.store.parts import Opened, index_folder
from spdk_kv.store.settings import StoreSettings
from spdk_kv.store.superblocks import (
    read_copies,
    read_count_block,
    refuse_if_written_over,
)

# Between two looks at a store that is being opened by its writer at this moment.
_PAUSE_S = 0.01
# That many: a writer changes the superblocks while it opens, for milliseconds.
_LOOKS = 50


@dataclass
class Readable:
    """The parts of a store that is open to be read. ``opened`` has the engine, and neither an index
    nor a lock; ``index`` is closed by whoever has this."""

    opened: Opened
    index: IndexReader
    snapshot: IndexSnapshot
    superblock: Superblock


def why_not(settings: StoreSettings) -> str:
    """What of ``settings`` makes no sense for a reader, and why; empty where all of it does."""
    if settings.create:
        return "create=True begins a store, and read_only=True changes nothing"
    if settings.capacity is not None:
        return "capacity= changes a store, and read_only=True changes nothing"
    if settings.write_budget is not None:
        return "write_budget= is for who writes, and read_only=True changes nothing"
    if not settings.verify:
        return (
            "read_only=True needs verify=True: a writer may use space anew while it is read here, "
            "and only checksums show that"
        )
    if settings.page_cache.mmap:
        return (
            "read_only=True excludes mmap=True: a writer may use space anew that is mapped here, "
            "and the tensor would change"
        )
    return ""


def open_readable(location: str | os.PathLike[str], settings: StoreSettings) -> Readable:
    """Opens the store at ``location`` to read it; see :func:`spdk_kv.open`."""
    place = parse_location(location)
    options = settings.engine.queue_options
    data = ""
    if place.scheme == "file":
        if settings.index_dir is not None:
            raise ValueError(
                "index_dir is for stores on drives; a file:// store has its index inside"
            )
        folder, data = place.path, os.path.join(place.path, "data")
        if not os.path.exists(data):
            raise StoreMismatch(f"no store at {place}, and read_only=True begins none")
    else:
        dir_ = settings.index_dir
        folder = index_folder(place) if dir_ is None else os.fsdecode(dir_)
    with ExitStack() as undo:
        drive = open_engine(
            place, data, engine=settings.engine.name, options=options, read_only=True
        )
        undo.callback(drive.close)
        path = os.path.join(folder, "index.sqlite")
        if not os.path.exists(path):
            if not data and choose(read_copies(drive)) is None:
                raise StoreMismatch(f"{place} is blank, and read_only=True begins no store on it")
            raise StoreMismatch(
                f"{place}: there is no index {path}, without which nothing can be found; a store "
                "on a drive may have it elsewhere (index_dir=)"
            )
        index = IndexReader(path)
        undo.callback(index.close)
        snapshot, superblock = _look(place, drive, index)
        undo.callback(snapshot.close)
        # Nothing is allocated: who asks what is free gets that from the snapshot.
        none = Allocator(BLOCK_NBYTES, BLOCK_NBYTES)
        opened = Opened(place, drive, none, None, None, superblock.uuid)
        undo.pop_all()
        return Readable(opened, index, snapshot, superblock)


def _look(place: Location, drive: Engine, index: IndexReader) -> tuple[IndexSnapshot, Superblock]:
    """The index, and the superblock that belongs to it. A writer that opens the store meanwhile
    changes one after the other: what does not match is looked at again, until it stays."""
    before = -1
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S)
        count = read_count_block(drive)  # before the index, which may count more
        snapshot = index.take()
        try:
            copies = read_copies(drive)
            if drive.capacity_nbytes is not None:
                refuse_if_written_over(drive.where, copies)
            superblock = choose(copies)
            counted = parse_count(count, snapshot.uuid)
            check_match(place, drive, snapshot, superblock, counted)
            if superblock is None:
                raise StoreMismatch(f"no store at {place} yet: its making was not finished")
        except (StoreMismatch, CorruptionError):
            snapshot.close()
            if snapshot.commits == before or look == _LOOKS - 1:
                raise
            before = snapshot.commits
        except BaseException:
            snapshot.close()
            raise
        else:
            return snapshot, superblock
    raise AssertionError("not reached")
