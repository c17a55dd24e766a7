"""Pages of several pieces to a store and back: each is one blob, so that it is there whole or not
at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spdk_kv.integrations.pages import Page, get_pages, put_pages
from spdk_kv.scattered import Bytes, Scattered
from spdk_kv.store import KVStore

# Pages that the drive cannot reach where they lie go through memory of the store's, at most this
# many bytes at a time, or one by one if they are larger.
_COPIED_NBYTES = 32 << 20

Pieces = tuple[str, Sequence[Bytes]]


def put_pieces(store: KVStore, pages: Sequence[Pieces]) -> list[bool]:
    """As :func:`put_pages`; what is stored already is not written again."""
    return [
        sound for batch in _batches(store, pages) for sound in put_pages(store, batch, again=False)
    ]


def get_pieces(store: KVStore, pages: Sequence[Pieces]) -> list[bool]:
    """As :func:`get_pages`."""
    return [sound for batch in _batches(store, pages) for sound in get_pages(store, batch)]


def _batches(store: KVStore, pages: Sequence[Pieces]) -> Iterator[Sequence[Page]]:
    values = [(key, Scattered(pieces)) for key, pieces in pages]
    first = nbytes = 0
    for at, (_, value) in enumerate(values):
        more = 0 if value.is_whole(store.engine.block_nbytes) else value.nbytes
        if nbytes and nbytes + more > _COPIED_NBYTES:
            yield values[first:at]
            first, nbytes = at, 0
        nbytes += more
    if first < len(values):
        yield values[first:]
