"""Opening a store: lock, data, superblock and index, and that they belong together.

Nothing is ever formatted over. A new store is begun only where there is nothing: a folder with
neither data nor index, or (with ``create``) a drive whose ends are blank.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from spdk_kv._native.table import BlobTable
from spdk_kv.engines import Engine, FileEngine, Location, QueueOptions, open_engine, parse_location
from spdk_kv.errors import (
    CapacityError,
    DeviceTimeout,
    SpdkKvError,
    StoreLocked,
    StoreMismatch,
    file_error,
)
from spdk_kv.index import BlobRecord, Index, SequenceRecord
from spdk_kv.placement import (
    DATA_START,
    Allocator,
    CommandsLock,
    StoreLock,
    Superblock,
    choose,
    fit_drive_id,
)
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.match import NEXT_GENERATION, check_match
from spdk_kv.store.recorded import load_recorded
from spdk_kv.store.records import blob_table
from spdk_kv.store.settings import StoreSettings
from spdk_kv.store.superblocks import (
    read_copies,
    read_count,
    read_superblock,
    refuse_if_written_over,
    refuse_unless_blank,
    write_superblock,
)
from spdk_kv.units import GIB, align_down, format_nbytes, parse_nbytes

log = logging.getLogger(__name__)

# Default capacity of ram:// and null://, and the most that a new folder gets by default.
_VOLATILE_CAPACITY_NBYTES = 1 * GIB
_MOST_BY_DEFAULT_NBYTES = 64 * GIB
# Rows of fewer are read as fast as a summary is written.
_MANY_BLOBS = 10_000
# A killed process holds its drive until its last command has ended, which is waited for.
_BUSY_TIMEOUT_S = 1.0
# What stores held whose drive did not let go, kept until the process ends.
_kept: list[ExitStack] = []


@dataclass
class Opened:
    """The parts of an open store. ``index`` and ``lock`` are None where nothing persists.

    ``allocator`` has the extents of ``blobs`` (least recently used first) and ``sequences``; all
    three belong to the catalog from now on. ``damaged``: how many entries were left out, because
    their extents cannot be theirs.
    """

    location: Location
    engine: Engine
    allocator: Allocator
    index: Index | None
    lock: StoreLock | None
    uuid: str
    commands: CommandsLock | None = None
    blobs: BlobTable[BlobRecord] = field(default_factory=blob_table)
    sequences: dict[str, SequenceRecord] = field(default_factory=dict)
    damaged: int = 0

    @property
    def paths(self) -> list[str]:
        """The files without which the store cannot be opened again."""
        paths = [self.engine.where] if isinstance(self.engine, FileEngine) else []
        if self.index is not None:
            paths += self.index.paths
        if self.lock is not None:
            paths.append(self.lock.path)
        return paths

    def close(self) -> None:
        """Gives everything back. DeviceTimeout if the drive does not let go: the store then stays
        locked, because commands still in flight would hit whoever opens it next."""
        with ExitStack() as rest:
            if self.lock is not None:
                rest.callback(self.lock.release)
            if self.index is not None:
                rest.callback(self.index.close)
            if self.commands is not None:
                rest.callback(self.commands.release)
            try:
                self.engine.close()
            except DeviceTimeout:
                _kept.append(rest.pop_all())
                raise
            except Exception:
                raise  # there is nothing in flight any more
            except BaseException:
                rest.pop_all()  # interrupted: commands may be in flight; close() is called again
                raise


def open_parts(location: str | os.PathLike[str], settings: StoreSettings) -> Opened:
    """Opens (or begins) the store at ``location``; see :func:`spdk_kv.open`."""
    capacity, engine = settings.capacity, settings.engine.name
    options = settings.engine.queue_options
    index_dir, create = settings.index_dir, settings.create
    place = parse_location(location)
    wanted = None if capacity is None else align_down(parse_nbytes(capacity), BLOCK_NBYTES)
    if wanted is not None and wanted < BLOCK_NBYTES:
        raise CapacityError(f"a capacity of {capacity!r} holds not even one block of 4096 bytes")
    if place.scheme in ("ram", "null"):
        nbytes = wanted or _VOLATILE_CAPACITY_NBYTES
        opened = open_engine(place, engine=engine, capacity_nbytes=nbytes, options=options)
        return Opened(place, opened, Allocator(nbytes, BLOCK_NBYTES), None, None, uuid.uuid4().hex)
    if place.scheme in ("block", "ng") or place.is_nvme:
        folder = index_folder(place) if index_dir is None else os.fsdecode(index_dir)
        return _open_drive(place, wanted, engine, options, folder, bool(create))
    if index_dir is not None:
        raise ValueError("index_dir is for stores on drives; a file:// store has its index inside")
    return _open_folder(place, wanted, engine, options, create is not False)


def _open_folder(
    place: Location, wanted: int | None, engine: str | None, options: QueueOptions, create: bool
) -> Opened:
    data = os.path.join(place.path, "data")
    if not create and not os.path.exists(data):
        raise StoreMismatch(f"no store at {place}, and create=False")
    _private_folder(place.path)
    with ExitStack() as undo:
        lock = StoreLock(os.path.join(place.path, "lock"))
        lock.acquire()
        undo.callback(lock.release)
        index_path = os.path.join(place.path, "index.sqlite")
        has_data = os.path.exists(data) and os.path.getsize(data) > 0
        if has_data and not os.path.exists(index_path):
            raise StoreMismatch(
                f"{data} is there, but its index {index_path} is missing; remove the folder to "
                "start empty"
            )
        index = Index(index_path, blob_table)
        undo.callback(index.close)
        drive = open_engine(place, data, engine=engine, options=options)
        assert isinstance(drive, FileEngine)
        undo.callback(drive.close)
        commands = CommandsLock(drive.fd, data)
        undo.callback(commands.release)
        opened = _join(place, drive, index, lock, wanted)
        opened.commands = commands
        undo.pop_all()
        return opened


def _open_drive(
    place: Location,
    wanted: int | None,
    engine: str | None,
    options: QueueOptions,
    folder: str,
    create: bool,
) -> Opened:
    """A store on a drive or a partition, its index in ``folder``."""
    _private_folder(folder)
    with ExitStack() as undo:
        # Before the drive is touched, so that an owner of the store does not notice.
        lock = StoreLock(os.path.join(folder, "lock"))
        lock.acquire()
        undo.callback(lock.release)
        drive = _open_when_free(place, engine, options)
        undo.callback(drive.close)
        index_path = os.path.join(folder, "index.sqlite")
        copies = read_copies(drive)
        found = choose(copies)
        refuse_if_written_over(drive.where, copies)
        if found is None:
            if os.path.exists(index_path):
                _refuse_wiped(place, index_path)
            refuse_unless_blank(drive)
            if not create:
                raise StoreMismatch(f"{place} is blank; pass create=True to begin a store on it")
        elif not os.path.exists(index_path):
            raise StoreMismatch(
                f"{place} holds the store {found.uuid}, whose index is not in {folder}; pass "
                "index_dir=, or wipe the drive yourself to start empty (wipefs does not know "
                "this superblock: blkdiscard, or dd over its first MiB)"
            )
        index = Index(index_path, blob_table)
        undo.callback(index.close)
        opened = _join(place, drive, index, lock, wanted)
        undo.pop_all()
        return opened


def _refuse_wiped(place: Location, index_path: str) -> None:
    """StoreMismatch where the index of a blank drive is that of a store which was made already."""
    index = Index(index_path)
    try:
        made = index.generation > 0
    finally:
        index.close()
    if made:
        raise StoreMismatch(
            f"{place} holds no store, but {index_path} is the index of store {index.uuid}: the "
            "drive was replaced or wiped. Put that drive back; to give up what it held, remove "
            f"{index_path}*, then a new store can be begun with create=True"
        )


def index_folder(place: Location) -> str:
    """The folder of a drive's index by default."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = os.path.basename(place.path)
    if place.is_nvme:
        # Readable, of letters that any filesystem takes, and for each location another one.
        text = str(place)
        number = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{re.sub('[^A-Za-z0-9.]+', '-', text)[-100:].strip('-.')}-{number}"
    return os.path.join(os.path.abspath(state), "spdk_kv", name)


def _open_when_free(place: Location, engine: str | None, options: QueueOptions) -> Engine:
    until = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            return open_engine(place, engine=engine, options=options)
        except StoreLocked:
            if time.monotonic() > until:
                raise
        time.sleep(0.01)


def _join(
    place: Location, drive: Engine, index: Index, lock: StoreLock, wanted: int | None
) -> Opened:
    """Checks that data and index are of one store, and marks both with the next generation.

    The index first notes the next generation, then the data gets it, then the index takes it over.
    A crash in between can thus be distinguished from an old copy of one of the two.
    """
    current = read_superblock(drive)
    # Before anything is written to the index: one that is refused stays as it is.
    generation = check_match(place, drive, index, current, read_count(drive, index.uuid))
    if generation != index.generation:
        index.generation = generation
    identity = fit_drive_id(drive.identity)
    capacity = _capacity(place, drive, current, wanted)
    recorded = load_recorded(index, max(capacity, current.capacity_nbytes if current else 0))
    allocator = recorded.allocator(current, capacity)
    # Written last, when nothing can be refused any more.
    generation += 1
    superblock = Superblock(
        index.uuid, BLOCK_NBYTES, capacity, generation, identity, drive.geometry
    )
    drive.ensure(DATA_START, DATA_START + capacity)
    recorded.forget_damaged(index)
    index.set_meta(NEXT_GENERATION, str(generation))
    write_superblock(drive, superblock)
    index.generation = generation
    if not index.has_summary and len(recorded.blobs) >= _MANY_BLOBS:
        # Not left to the close, which there is none of where processes are killed: each open would
        # read all rows.
        try:
            index.save_summary(recorded.blobs, recorded.blobs.changes)
        except (SpdkKvError, OSError) as failure:
            log.warning("the next open of %s reads all rows again: %s", place, failure)
    return Opened(
        place,
        drive,
        allocator,
        index,
        lock,
        index.uuid,
        blobs=recorded.blobs,
        sequences=recorded.sequences,
        damaged=recorded.damaged,
    )


def _capacity(
    place: Location, drive: Engine, current: Superblock | None, wanted: int | None
) -> int:
    size = drive.capacity_nbytes
    room = None if size is None else align_down(size - DATA_START, BLOCK_NBYTES)
    if room is not None and current is not None and current.capacity_nbytes > room:
        raise StoreMismatch(
            f"{place} shrank: the store holds {current.capacity_nbytes} bytes, the drive {room}"
        )
    if room is not None and room < BLOCK_NBYTES:
        raise CapacityError(f"{place} is too small for a store: {size} bytes")
    if wanted is None:
        if current is not None:
            return current.capacity_nbytes
        if room is not None:
            return room
        space = os.statvfs(place.path)
        free = align_down(space.f_bavail * space.f_frsize // 2, BLOCK_NBYTES)
        wanted = max(BLOCK_NBYTES, min(free, _MOST_BY_DEFAULT_NBYTES))
        log.info("%s: capacity %s", place, format_nbytes(wanted))
    if room is not None and wanted > room:
        raise CapacityError(
            f"{place} has room for {format_nbytes(room)}, not for {format_nbytes(wanted)}"
        )
    return wanted


def _private_folder(path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)  # whatever the umask
    except OSError as refused:
        raise file_error("create the folder", path, refused) from refused
