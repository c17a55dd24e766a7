"""Pages of several pieces to a store and back: each is one blob, so that it is there whole or not
at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.jobs import Page, get_pages, put_pages
from spdk_kv.integrations.sglang.pools import Bytes, gather, scatter
from spdk_kv.store import KVStore
from spdk_kv.tensors import array_from

# Pages are gathered this many bytes at a time, or one by one if they are larger.
_GATHERED_NBYTES = 32 << 20

Pieces = tuple[str, Sequence[Bytes]]


def put_pieces(store: KVStore, pages: Sequence[Pieces]) -> list[bool]:
    """As :func:`put_pages`; what is stored already is not written again, nor gathered."""
    there = _stored(store, pages)
    for batch in _batches([page for page in pages if page[0] not in there]):
        whole: list[Page] = []
        for key, pieces in batch:
            place = _place(store, pieces)
            if len(pieces) != 1:
                gather(pieces, place)
            whole.append((key, place))
        done = put_pages(store, whole, again=False)
        there.update(key for (key, _), is_stored in zip(batch, done, strict=True) if is_stored)
    return [key in there for key, _ in pages]


def get_pieces(store: KVStore, pages: Sequence[Pieces]) -> list[bool]:
    """As :func:`get_pages`."""
    sound: list[bool] = []
    for batch in _batches(pages):
        whole = [(key, _place(store, pieces)) for key, pieces in batch]
        found = get_pages(store, whole)
        for (_, pieces), (_, place), is_sound in zip(batch, whole, found, strict=True):
            if is_sound and len(pieces) != 1:
                scatter(place, pieces)
        sound += found
    return sound


def _place(store: KVStore, pieces: Sequence[Bytes]) -> Bytes:
    """Where a page is in one piece: itself, or memory that the drive reaches without a copy."""
    if len(pieces) == 1:
        return pieces[0]
    nbytes = _nbytes(pieces)
    return array_from(store.staging.lease(nbytes), "uint8", (nbytes,))


def _stored(store: KVStore, pages: Sequence[Pieces]) -> set[str]:
    """The keys of those that are there."""
    try:
        sizes = store.sizes(key for key, _ in pages)
    except SpdkKvError:  # told, and logged, by what is asked of the store next
        return set()
    return {
        key for (key, pieces), nbytes in zip(pages, sizes, strict=True) if nbytes == _nbytes(pieces)
    }


def _batches(pages: Sequence[Pieces]) -> Iterator[Sequence[Pieces]]:
    first = nbytes = 0
    for at, (_, pieces) in enumerate(pages):
        more = 0 if len(pieces) == 1 else _nbytes(pieces)
        if nbytes and nbytes + more > _GATHERED_NBYTES:
            yield pages[first:at]
            first, nbytes = at, 0
        nbytes += more
    if first < len(pages):
        yield pages[first:]


def _nbytes(pieces: Sequence[Bytes]) -> int:
    return sum(piece.nbytes for piece in pieces)
