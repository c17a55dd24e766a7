"""Opening a store: lock, data, superblock and index, and that they belong together.

Nothing is ever formatted over. A new store is begun only where there is nothing: a folder with
neither data nor index, or (with ``create``) a device whose ends are blank.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, FileEngine, Location, QueueOptions, open_engine, parse_location
from spdk_kv.errors import (
    CapacityError,
    CorruptionError,
    DeviceTimeout,
    StoreLocked,
    StoreMismatch,
    device_error,
)
from spdk_kv.index import BlobRecord, Index, SequenceRecord
from spdk_kv.placement import (
    COPY_OFFSETS,
    DATA_START,
    SUPERBLOCK_NBYTES,
    Allocator,
    CommandsLock,
    StoreLock,
    Superblock,
    choose,
    fit_device_id,
    is_blank,
    pack,
)
from spdk_kv.store.settings import StoreSettings
from spdk_kv.units import GIB, align_down, align_up, format_nbytes, parse_nbytes

log = logging.getLogger(__name__)

BLOCK_NBYTES = 4096
"""Extents are whole blocks of this size, whatever the device's own is."""
_VOLATILE_CAPACITY = 1 * GIB
_MOST_BY_DEFAULT = 64 * GIB
# This much at either end of a block device has to be zero before a store is begun on it:
# partition tables, filesystems, md and LVM all leave a mark within it.
_BLANK_NBYTES = 1 << 20
# In the index: the generation that an open was about to write.
_BUSY_TIMEOUT_S = 1.0
# In which one copy of the superblock may differ from the other: a torn write, a few flipped bits.
_MOST_DAMAGED_NBYTES = 64
_MEANT = "next generation"
# Of stores whose device did not let go: held until the process ends.
_kept: list[ExitStack] = []


@dataclass
class Opened:
    """The parts of an open store. ``index`` and ``lock`` are None where nothing persists.

    ``allocator`` has the extents of ``blobs`` (least recently used first) and ``sequences``; all
    three are the catalog's from now on.
    """

    location: Location
    engine: Engine
    allocator: Allocator
    index: Index | None
    lock: StoreLock | None
    uuid: str
    commands: CommandsLock | None = None
    blobs: OrderedDict[str, BlobRecord] = field(default_factory=OrderedDict)
    sequences: dict[str, SequenceRecord] = field(default_factory=dict)

    def close(self) -> None:
        """Gives everything back. DeviceTimeout if the device does not let go: the store then stays
        locked, for whoever opened it would meet our commands still in flight."""
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
        nbytes = wanted or _VOLATILE_CAPACITY
        opened = open_engine(place, engine=engine, capacity_nbytes=nbytes, options=options)
        return Opened(place, opened, Allocator(nbytes, BLOCK_NBYTES), None, None, uuid.uuid4().hex)
    if place.scheme in ("block", "ng") or place.is_nvme:
        folder = index_folder(place) if index_dir is None else os.fspath(index_dir)
        return _open_device(place, wanted, engine, options, folder, bool(create))
    if index_dir is not None:
        raise ValueError("index_dir is for stores on devices; a file:// store has its index inside")
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
        index = Index(index_path)
        undo.callback(index.close)
        device = open_engine(place, data, engine=engine, options=options)
        assert isinstance(device, FileEngine)
        undo.callback(device.close)
        commands = CommandsLock(device.fd, data)
        undo.callback(commands.release)
        opened = _join(place, device, index, lock, wanted)
        opened.commands = commands
        undo.pop_all()
        return opened


def _open_device(
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
        # Before the device is touched: whoever owns the store is not to notice.
        lock = StoreLock(os.path.join(folder, "lock"))
        lock.acquire()
        undo.callback(lock.release)
        device = _open_when_free(place, engine, options)
        undo.callback(device.close)
        index_path = os.path.join(folder, "index.sqlite")
        copies = _read_copies(device)
        found = choose(copies)
        _refuse_if_written_over(device.where, copies)
        if found is None and not create:
            raise StoreMismatch(f"{place} is blank; pass create=True to begin a store on it")
        if found is None:
            _refuse_unless_blank(device)
        elif not os.path.exists(index_path):
            raise StoreMismatch(
                f"{place} holds the store {found.uuid}, whose index is not in {folder}; pass "
                "index_dir=, or wipe the device yourself to start empty (wipefs does not know "
                "this superblock: blkdiscard, or dd over its first MiB)"
            )
        index = Index(index_path)
        undo.callback(index.close)
        opened = _join(place, device, index, lock, wanted)
        undo.pop_all()
        return opened


def index_folder(place: Location) -> str:
    """Where a device's index lies if nobody says otherwise."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = os.path.basename(place.path)
    if place.is_nvme:
        # Readable, of letters that any filesystem takes, and for each location another one.
        text = str(place)
        number = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{re.sub('[^A-Za-z0-9.]+', '-', text)[-100:].strip('-.')}-{number}"
    return os.path.join(os.path.abspath(state), "spdk_kv", name)


def _open_when_free(place: Location, engine: str | None, options: QueueOptions) -> Engine:
    # A process that was killed holds the device until its last command has ended.
    until = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            return open_engine(place, engine=engine, options=options)
        except StoreLocked:
            if time.monotonic() > until:
                raise
        time.sleep(0.01)


def _join(
    place: Location, device: Engine, index: Index, lock: StoreLock, wanted: int | None
) -> Opened:
    """Checks that data and index are of one store, and marks both with the next generation.

    The index says first which generation is meant, then the data gets it, then the index has it:
    so a crash in between is told from an old copy of one of the two.
    """
    current = read_superblock(device)
    # Of generation 0 is an index whose store was never begun to the end.
    generation = index.generation
    if current is None and generation:
        raise StoreMismatch(
            f"{place}: the index is that of store {index.uuid}, but the data carries no "
            "superblock: it was replaced or wiped. Put it back, or remove the index to start empty"
        )
    if current is not None and current.uuid != index.uuid:
        raise StoreMismatch(
            f"{place}: the data is that of store {current.uuid}, the index that of {index.uuid}"
        )
    if current is not None and current.generation != generation:
        if str(current.generation) == index.get_meta(_MEANT):
            generation = index.generation = current.generation
        else:
            raise StoreMismatch(
                f"{place}: data of generation {current.generation} beside an index of generation "
                f"{generation}: one of them is an old copy"
            )
    identity = fit_device_id(device.identity)
    if current is not None and current.device_id != identity:
        raise StoreMismatch(
            f"{place}: the store was made on device {current.device_id!r}, this is {identity!r}"
        )
    blobs, sequences = OrderedDict(index.load_blobs()), dict(index.load_sequences())
    capacity = _capacity(place, device, current, wanted)
    allocator = _allocator(index, blobs, sequences, current, capacity)
    # Only now, when nothing can be refused any more.
    generation += 1
    superblock = Superblock(index.uuid, BLOCK_NBYTES, capacity, generation, identity)
    device.ensure(DATA_START)
    index.set_meta(_MEANT, str(generation))
    _write_superblock(device, superblock)
    index.generation = generation
    return Opened(
        place, device, allocator, index, lock, index.uuid, blobs=blobs, sequences=sequences
    )


def _allocator(
    index: Index,
    blobs: Mapping[str, BlobRecord],
    sequences: Mapping[str, SequenceRecord],
    current: Superblock | None,
    capacity: int,
) -> Allocator:
    """The allocator with all recorded extents; CapacityError if a smaller store was asked for
    than those reach."""
    live = [(blob.offset, blob.nbytes) for blob in blobs.values() if blob.nbytes]
    for sequence in sequences.values():
        live += [(unit.offset, sequence.extent_nbytes) for unit in sequence.units]
    reached = max((offset + nbytes for offset, nbytes in live), default=DATA_START) - DATA_START
    if current is not None and capacity < reached <= current.capacity_nbytes:
        raise CapacityError(
            f"what is stored reaches to {format_nbytes(align_up(reached, BLOCK_NBYTES))} "
            f"({reached} bytes); a capacity of {format_nbytes(capacity)} would cut it off"
        )
    allocator = Allocator(capacity, BLOCK_NBYTES, DATA_START)
    try:
        allocator.reserve_all(live)
    except CorruptionError as damage:
        raise CorruptionError(f"the index {index.path} is damaged: {damage}") from damage
    return allocator


def _capacity(
    place: Location, device: Engine, current: Superblock | None, wanted: int | None
) -> int:
    size = device.capacity_nbytes
    room = None if size is None else align_down(size - DATA_START, BLOCK_NBYTES)
    if room is not None and current is not None and current.capacity_nbytes > room:
        raise StoreMismatch(
            f"{place} shrank: the store holds {current.capacity_nbytes} bytes, the device {room}"
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
        wanted = max(BLOCK_NBYTES, min(free, _MOST_BY_DEFAULT))
        log.info("%s: capacity %s", place, format_nbytes(wanted))
    if room is not None and wanted > room:
        raise CapacityError(
            f"{place} has room for {format_nbytes(room)}, not for {format_nbytes(wanted)}"
        )
    return wanted


def read_superblock(device: Engine) -> Superblock | None:
    """The newest good superblock; None where there is none yet. CorruptionError, DeviceError."""
    return choose(_read_copies(device))


def _read_copies(device: Engine) -> list[bytes]:
    size = device.capacity_nbytes
    copies = []
    for offset in COPY_OFFSETS:
        if size is None and os.path.getsize(device.where) < offset + SUPERBLOCK_NBYTES:
            copies.append(bytes(SUPERBLOCK_NBYTES))
        else:
            copies.append(_read(device, offset, SUPERBLOCK_NBYTES))
    return copies


def _write_superblock(device: Engine, superblock: Superblock) -> None:
    # One copy at a time, each on the medium before the next: a power cut spoils at most one.
    for offset in COPY_OFFSETS:
        region = Region(SUPERBLOCK_NBYTES)
        transfer = device.transfer(WRITE)
        transfer.keep(region)
        memoryview(region)[:SUPERBLOCK_NBYTES] = pack(superblock)
        transfer.add(offset, region.address, SUPERBLOCK_NBYTES)
        device.run(transfer)
        device.flush()


def _read(device: Engine, offset: int, nbytes: int) -> bytes:
    region = Region(nbytes)
    transfer = device.transfer(READ)
    transfer.keep(region)
    transfer.add(offset, region.address, nbytes)
    device.run(transfer)
    return bytes(memoryview(region)[:nbytes])


def _refuse_unless_blank(device: Engine) -> None:
    size = device.capacity_nbytes or 0
    for offset in {0, max(0, align_down(size - _BLANK_NBYTES, BLOCK_NBYTES))}:
        if any(_read(device, offset, min(_BLANK_NBYTES, size - offset))):
            raise StoreMismatch(
                f"{device.where} is not blank within the MiB at offset {offset} and holds no store "
                "of spdk_kv; it is not touched. `wipefs -n` and `blkid` say what may be on it"
            )


def _refuse_if_written_over(path: str, copies: list[bytes]) -> None:
    """A filesystem or a partition table made over a store leaves its second superblock: that must
    not pass for a store with a damaged first one, which opening would mend."""
    first, second = copies
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    if any(map(is_blank, copies)) or changed <= _MOST_DAMAGED_NBYTES:
        return
    for bad, good in ((0, 1), (1, 0)):
        try:
            choose([copies[bad]])
        except CorruptionError:
            at, source = COPY_OFFSETS[bad], COPY_OFFSETS[good]
            raise StoreMismatch(
                f"{path} held a store, but something else was written at offset {at} (`wipefs -n` "
                "and `blkid` may say what); it is not touched. If it is damage and nothing more, "
                f"mend it: copy its 4096 bytes at offset {source} to offset {at} (of a node: dd "
                f"if={path} of={path} bs=4096 count=1 conv=notrunc skip={source // 4096} "
                f"seek={at // 4096})"
            ) from None


def _private_folder(path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)  # whatever the umask
    except OSError as refused:
        raise device_error("mkdir", 0, 0, refused.errno or 0, path) from refused
