"""Which pieces of a text's state are kept, and under which keys. Pure: no I/O, no host.

A text is cut every `every` tokens, and its end is one shorter piece. A piece's key is a digest of
all tokens up to its end, and where it starts: equal keys mean the same piece of equal beginnings,
and texts that begin alike share pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
"""Token ids, ``[tokens]``."""

# 256 bits, so that nobody can write two texts with one key.
_DIGEST_NBYTES = 32


class Piece(NamedTuple):
    """The state of the tokens from ``start`` to before ``end``, stored under ``key``."""

    start: int
    end: int
    key: str


def tokens_of(ids: Any) -> Tokens:
    """``ids``, any sequence of token ids, as an array of its own."""
    return np.array(ids, np.dtype("<i4"))


def common_tokens(a: Tokens, b: Tokens) -> int:
    """How many tokens ``a`` and ``b`` have in common from their beginning."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def pieces_of(prefix: str, tokens: Tokens, every: int, ends: set[int]) -> Iterator[Piece]:
    """The pieces that hold the first ``end`` tokens for each of ``ends``, in order, each once."""
    longest = max(ends)
    whole = set(range(every, longest + 1, every))
    for end, digest in _digests(tokens, sorted(whole | ends)):
        yield _piece(prefix, digest, (end - 1) // every * every, end)


def find(
    prefix: str, tokens: Tokens, every: int, most: int, is_stored: Callable[[str], bool]
) -> list[Piece]:
    """The pieces that hold the longest stored beginning of ``tokens``, of at most ``most`` tokens,
    in order; none where nothing is stored."""
    found: list[Piece] = []
    for end, digest in _digests(tokens, range(every, most + 1, every)):
        piece = _piece(prefix, digest, end - every, end)
        if not is_stored(piece.key):
            break
        found.append(piece)
    start = len(found) * every
    # A shorter piece may end anywhere: looking for each end takes a microsecond.
    ends = range(start + 1, min(start + every - 1, most) + 1)
    for end, digest in reversed(list(_digests(tokens, ends))):
        piece = _piece(prefix, digest, start, end)
        if is_stored(piece.key):
            found.append(piece)
            break
    return found


def _piece(prefix: str, digest: str, start: int, end: int) -> Piece:
    return Piece(start, end, f"{prefix}{digest}-{start}")


def _digests(tokens: Tokens, ends: Any) -> Iterator[tuple[int, str]]:
    """(end, digest of what is before it) of each of ``ends``, which ascend."""
    digest = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    done = 0
    for end in ends:
        digest.update(tokens[done:end].tobytes())
        done = end
        yield end, digest.copy().hexdigest()
