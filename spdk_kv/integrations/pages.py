"""Pages of a host's KV cache to a store and back, a batch at a time.

A page is a blob under the host's own key: bytes of the KV cache in the host's layout.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    DeviceGone,
    DeviceTimeout,
    ReadOnlyStore,
    SpdkKvError,
)
from spdk_kv.integrations.hugepages import HugePages
from spdk_kv.scattered import Scattered
from spdk_kv.store import KVStore

log = logging.getLogger(__name__)

Value = np.ndarray[Any, Any] | Scattered

Page = tuple[str, Any]
"""A key, and a C-contiguous buffer or :class:`Scattered`: the bytes to put, or (writable) the place
to get to."""

# Of this process, whose memory it is about.
_HUGE_PAGES = HugePages()
# What no page of a batch escapes.
_FOR_ALL = (ClosedError, DeviceGone, DeviceTimeout, ReadOnlyStore)


def put_pages(store: KVStore, pages: Sequence[Page], *, again: bool = True) -> list[bool]:
    """Stores ``pages`` in one transfer, and blocks until the drive has them.

    Args:
        store: Where to.
        pages: Of several under one key the last counts.
        again: Write also what is stored already under its key in the same length. False is for
            keys that are a hash of the content.

    Returns:
        For each page whether it is stored now. What the store's write budget is too low for is
        not; what failed is logged, not raised. Its key holds what it held before.
    """
    wanted = {key: bytes_of(buffer) for key, buffer in pages}
    stored: set[str] = set()
    try:
        if not again:
            sizes = store.sizes(wanted)
            there = [
                key
                for (key, view), nbytes in zip(wanted.items(), sizes, strict=True)
                if nbytes == view.nbytes
            ]
            # Who brings them once more had them computed anew, or read: they are wanted.
            store.touch(reversed(there))
            stored.update(there)
        wanted = {key: view for key, view in wanted.items() if key not in stored}
        worth = store.worth_writing({key: view.nbytes for key, view in wanted.items()})
        chosen = zip(wanted.items(), worth, strict=True)
        wanted = {key: view for (key, view), is_worth in chosen if is_worth}
        _back(store, wanted.values())
        _put(wanted, store, stored)
    except SpdkKvError as failure:
        missing = sum(key not in stored for key, _ in pages)
        log.warning("%d of %d pages were not stored: %s", missing, len(pages), said(failure))
    return [key in stored for key, _ in pages]


def _put(views: dict[str, Value], store: KVStore, stored: set[str]) -> None:
    if not views:
        return
    try:
        store.put_many(views)
    except CapacityError:
        if len(views) == 1:
            raise
        # All together may need more room than each by itself.
        for key, view in views.items():
            store.put(key, view)
            stored.add(key)
    stored.update(views)


def get_pages(store: KVStore, pages: Sequence[Page]) -> list[bool]:
    """Reads ``pages`` in one transfer, and blocks until they are there.

    Returns:
        For each page whether its buffer holds exactly the bytes that were put. False: there is
        none of that key and length, it was damaged, or the drive failed, which is logged and not
        raised; what the buffer holds is undefined.
    """
    sound = [False] * len(pages)
    try:
        sizes = store.sizes(key for key, _ in pages)
        views = [bytes_of(buffer) for _, buffer in pages]
        there = [at for at, view in enumerate(views) if view.nbytes == sizes[at]]
        _back(store, [views[at] for at in there])
        for at in _get(store, [(pages[at][0], views[at]) for at in there]):
            sound[there[at]] = True
        # Pages are of use with all that are before them only, so the last ones are to go first.
        read = [key for (key, _), ok in zip(pages, sound, strict=True) if ok]
        store.touch(reversed(read))
    except SpdkKvError as failure:
        log.warning("%d pages were not read: %s", len(pages) - sum(sound), said(failure))
    return sound


def _get(store: KVStore, pages: list[Page]) -> list[int]:
    """Which of ``pages`` were read."""
    if not pages:
        return []
    try:
        store.get_many([key for key, _ in pages], out=[view for _, view in pages])
    except _FOR_ALL:
        raise
    except SpdkKvError as failure:
        if len(pages) == 1:
            log.warning("page %r was not read: %s", pages[0][0], said(failure))
            return []
        # One that is damaged, or was evicted meanwhile, is no reason to lose the others.
        return [at for at, page in enumerate(pages) if _get(store, [page])]
    return list(range(len(pages)))


def said(failure: BaseException, *, fully: bool = False) -> str:
    """What a log is told of ``failure``; ``fully``: and where it came from.

    The failure itself has the frames that it came through, which hold the host's memory, and a log
    may keep what it is told.
    """
    return "".join(traceback.format_exception(failure)) if fully else str(failure)


def _back(store: KVStore, views: Iterable[Value]) -> None:
    """Has a drive find the host's memory in large pieces, if it reads and writes there itself."""
    if store.engine.direct and store.engine.options.hugepages:
        for view in views:
            _HUGE_PAGES.back(view.pieces if isinstance(view, Scattered) else (view,))


def bytes_of(buffer: Any) -> Value:
    if isinstance(buffer, Scattered):
        return buffer
    view = memoryview(buffer)
    if not view.nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(view, np.uint8)
