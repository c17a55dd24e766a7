"""A get that returns the page cache itself: blobs mapped into memory instead of read into it."""

from __future__ import annotations

import logging
import mmap
import weakref
from typing import Any, cast

import numpy as np

from spdk_kv._native.checksum import crc32c
from spdk_kv.engines import PageCacheEngine
from spdk_kv.store.blobs import check_key, damage
from spdk_kv.store.host import Host
from spdk_kv.tensors import tensor_from

log = logging.getLogger(__name__)

# madvise(2), from Linux 5.14 on: gives every page its own copy, and leaves the bytes as they are.
_MADV_POPULATE_WRITE = 23


def map_blob(store: Host, key: str) -> Any:
    """A tensor that is the page cache itself. Its extent stays pinned while it lives."""
    check_key(key)
    (record,) = store.catalog.records.find((key,))
    if not record.nbytes:
        return tensor_from(None, record.dtype, record.shape)
    pin = store.catalog.quarantine.unpin_at_end(record)
    mapping = cast(PageCacheEngine, store.engine).map(record.offset, record.nbytes)
    mapping.at_end = pin
    store.mappings.add(mapping)
    if store.verify and crc32c(mapping) != record.crc:
        store.catalog.records.drop_damaged(key, record)
        raise damage(store, [key])
    return tensor_from(mapping, record.dtype, record.shape)


def detach(mappings: weakref.WeakSet[mmap.mmap]) -> None:
    """Gives what is still mapped memory of its own, because the next owner of the store may write
    over the extents. Blocks on the drive."""
    for mapping in list(mappings):
        try:
            mapping.madvise(_MADV_POPULATE_WRITE)
        except OSError as refused:
            log.debug("MADV_POPULATE_WRITE: %s; page by page instead", refused)
            # Writing the first byte of every page as it is copies the page.
            np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE] |= 0
