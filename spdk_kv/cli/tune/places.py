"""A store to measure on, which leaves nothing behind and takes nothing away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from spdk_kv.engines import Location, parse_location
from spdk_kv.errors import CapacityError, file_error
from spdk_kv.units import MIB, format_nbytes

if TYPE_CHECKING:
    from spdk_kv.store import KVStore

_LEAST_NBYTES = MIB


def _capacity(nbytes: int) -> int:
    # Extents are whole chunks, and the store needs some room for itself.
    return nbytes + nbytes // 8 + 64 * MIB


@contextmanager
def measured_store(uri: str, nbytes: int) -> Iterator[tuple[KVStore, int]]:
    """A store on the drive of ``uri``, and how many bytes to write there: ``nbytes``, or as many as
    leave half of what is free.

    In a folder it is one of its own beside what lies there. On a drive it is the drive's store, of
    which nothing is evicted.

    Raises:
        click.BadParameter: ``uri`` makes no sense.
        SpdkKvError: There is no store on the drive, no room, or whatever the store raises.
    """
    from spdk_kv.store import PageCacheOptions
    from spdk_kv.store import open as open_store

    place = _place(uri)
    # The drive is to be measured, not the page cache.
    direct = PageCacheOptions(policy="direct")
    if place.scheme == "file":
        with _folder_in(place.path) as folder:
            nbytes = _fitting(nbytes, _free_nbytes(folder), place)
            with open_store(folder, capacity=_capacity(nbytes), page_cache=direct) as store:
                yield store, nbytes
    elif place.scheme == "ram":
        with open_store(uri, capacity=_capacity(nbytes), page_cache=direct) as store:
            yield store, nbytes
    else:
        with open_store(uri, create=False, eviction="none", page_cache=direct) as store:
            yield store, _fitting(nbytes, store.stats()["free_nbytes"], place)


def _place(uri: str) -> Location:
    try:
        place = parse_location(uri)
    except ValueError as wrong:
        raise click.BadParameter(str(wrong), param_hint="'--location'") from wrong
    if place.scheme == "null":
        raise click.BadParameter(
            "null:// keeps no bytes, and so there are none to be read", param_hint="'--location'"
        )
    return place


@contextmanager
def _folder_in(path: str) -> Iterator[str]:
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".spdk_kv-tune-", dir=path)
    except OSError as refused:
        raise file_error("create a folder in", path, refused) from refused
    with temporary as folder:
        yield folder


def _free_nbytes(folder: str) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _fitting(nbytes: int, free_nbytes: int, place: Location) -> int:
    fitting = min(nbytes, free_nbytes // 2 - 64 * MIB)
    if fitting < _LEAST_NBYTES:
        raise CapacityError(
            f"{place} has only {format_nbytes(free_nbytes)} free, too little to measure reads"
        )
    return fitting
