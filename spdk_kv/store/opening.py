"""``spdk_kv.open``: the one way to a store, and what can be set about it."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from spdk_kv.errors import DeviceError, EngineUnavailable
from spdk_kv.store.options import EngineOptions, PageCacheOptions
from spdk_kv.store.reader.parts import why_not
from spdk_kv.store.reader.store import StoreReader
from spdk_kv.store.renamed import RenamedKeywords, option_objects
from spdk_kv.store.settings import Eviction, StoreSettings
from spdk_kv.store.store import KVStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)


def open(
    location: str | os.PathLike[str] = "auto",
    *,
    capacity: int | str | None = None,
    create: bool | None = None,
    engine: str | EngineOptions | None = None,
    page_cache: PageCacheOptions | int | str | None = None,
    eviction: Eviction = "slru",
    verify: bool = True,
    index_dir: str | os.PathLike[str] | None = None,
    flush_interval_s: float | None = 5.0,
    write_budget: str | None = None,
    read_only: bool = False,
    **renamed: Unpack[RenamedKeywords],
) -> KVStore:
    """Opens the store at ``location``, or begins one where there is none.

    Blocks on the drive.

    Args:
        location: Where the store lies.

            - ``file:///DIR`` (or a path): a folder; data file, index and lock are in it.
            - ``block:///dev/NODE``: a whole partition or drive that the kernel keeps.
            - ``ng:///dev/ngXnY``: an NVMe namespace that the kernel keeps, by io_uring passthrough.
            - ``spdk://0000:01:00.0/1``: namespace 1 of an NVMe drive that is bound to vfio-pci.
            - ``spdk+tcp://HOST:PORT/NQN/1``: namespace 1 of an NVMe/TCP target.
            - ``spdk+vfiouser:///SOCKET-DIR/NQN/1``: namespace 1 of a vfio-user target.
            - ``ram://``: host memory, gone when the store is closed.
            - ``null://``: keeps no bytes, to measure everything else.
            - ``auto``: a folder below ``$XDG_CACHE_HOME``.
        capacity: Bytes of tensors at most, as an int or text like ``"64 GiB"``. By default what it
            was; for a new store half of the free space up to 64 GiB, or all of a drive, or 1 GiB
            of memory.
        create: False never begins a store, and opens one that lies on a read-only filesystem as
            with ``read_only=True``, which the log says. True is needed to begin one on a drive,
            both ends of which have to be blank.
        engine: ``"uring"``, ``"threads"`` or ``"pagecache"``, or an :class:`EngineOptions` with
            all that can be set about how the drive is driven. None takes the best direct engine
            that may be used.
        page_cache: A :class:`PageCacheOptions`: what is read through the page cache, and how much
            memory it may hold.
        eviction: ``"slru"`` (segmented LRU) makes room by forgetting the blobs used longest ago,
            where one that was put and never used since counts as eight times as old: a flood of
            what comes once does not drive out what is used again. ``"lru"`` does without that.
            Of either those go that are neighbours on the drive: an extent is contiguous.
            ``"none"`` refuses with CapacityError.
        verify: Check checksums on every read.
        index_dir: The folder for the index of a store on a drive. By default one below
            ``$XDG_STATE_HOME``, named after the drive.
        flush_interval_s: Seconds after which what was put is made durable in the background. None
            leaves that to :meth:`KVStore.flush` and :meth:`KVStore.close`.
        write_budget: At most this much is written to the drive, as text like ``"200 GiB/day"``
            (per minute, hour, day, week or year), an eighth of it at once. With nothing left a put
            raises WriteBudgetSpent; what engines store through the plug-ins is declined from
            earlier on, unless it is asked for again. None writes whatever is asked.
        read_only: Read a store that exists, and write nothing anywhere: beside the process that
            writes it, in any number of processes, on a read-only filesystem. The store is as of
            the writer's last flush. It takes up later ones when a key is not found, and by
            :meth:`KVStore.refresh`. Calls that would change it raise ReadOnlyStore. Takes about
            the size of the index in memory. For ``file://`` and ``block://``; excludes
            ``capacity``, ``create=True``, ``verify=False``, ``mmap`` and ``write_budget``.
        **renamed: Keywords of earlier releases that are fields of ``engine`` and ``page_cache``
            now. They work for one more release, with a DeprecationWarning.

    Returns:
        The open store. Close it, or use it as a context manager.

    Raises:
        ValueError: The location or an option makes no sense.
        TypeError: An argument has the wrong type, or was given in its old and its new form.
        StoreLocked: Another process has it open; the message names its PID.
        StoreMismatch: There is no store, or data and index do not belong together.
        CorruptionError: The superblock or the index is damaged.
        CapacityError: There is no room for ``capacity``, or what is stored exceeds it.
        EngineUnavailable: What is missing, and the command that mends it.
        DeviceError: The drive failed.
    """
    engine_options, page_cache_options = option_objects(engine, page_cache, renamed)
    settings = StoreSettings(
        capacity=capacity,
        create=create,
        engine=engine_options,
        page_cache=page_cache_options,
        eviction=eviction,
        verify=verify,
        index_dir=index_dir,
        flush_interval_s=flush_interval_s,
        write_budget=write_budget,
    )
    if read_only:
        return StoreReader(location, settings)
    try:
        return KVStore(location, settings)
    except DeviceError as refused:
        if create is not False or refused.status != errno.EROFS or why_not(settings):
            raise
        try:
            store = StoreReader(location, settings)
        except EngineUnavailable:
            raise refused from None
        log.warning(
            "%s is opened read_only, since nothing can be written there: %s",
            store.location,
            refused,
        )
        return store
