"""Which pieces of a text are stored, and which are found again: without the host."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spdk_kv.integrations.llama_cpp.keys import (
    Piece,
    common_tokens,
    find,
    pieces_of,
    tokens_of,
)

IDS = st.lists(st.integers(0, 2), max_size=40)


def stored(texts: list[list[int]], every: int) -> dict[str, list[int]]:
    """The keys of all pieces of ``texts``, each with the tokens up to its end."""
    return {
        piece.key: text[: piece.end]
        for text in texts
        if text
        for piece in pieces_of("p/", tokens_of(text), every, {len(text)})
    }


def covers(pieces: list[Piece]) -> int:
    """How many tokens ``pieces`` hold; fails if there is a gap between them."""
    end = 0
    for piece in pieces:
        assert piece.start == end
        end = piece.end
    return end


@given(st.lists(IDS, max_size=4), IDS, st.integers(1, 9))
def test_what_is_found_is_a_stored_beginning_and_no_shorter_than_any_other(
    texts: list[list[int]], asked: list[int], every: int
) -> None:
    keys = stored(texts, every)
    pieces = find("p/", tokens_of(asked), every, len(asked), keys.__contains__)
    length = covers(pieces)
    for piece in pieces:
        assert keys[piece.key] == asked[: piece.end]
    # A text is found again as far as it was cut, and whole if it is all asked.
    longest = max((common(text, asked) for text in texts), default=0)
    assert longest // every * every <= length
    whole = max((len(text) for text in texts if text == asked[: len(text)]), default=0)
    assert whole <= length


def common(a: list[int], b: list[int]) -> int:
    return common_tokens(tokens_of(a), tokens_of(b))


@given(IDS, st.integers(1, 9), st.data())
def test_pieces_go_to_every_end_that_is_asked(ids: list[int], every: int, data: st.DataObject):
    if not ids:
        return
    ends = data.draw(st.sets(st.integers(1, len(ids)), min_size=1))
    pieces = list(pieces_of("p/", tokens_of(ids), every, ends))
    assert ends <= {piece.end for piece in pieces}
    assert len({piece.key for piece in pieces}) == len(pieces)
    for piece in pieces:
        assert piece.start % every == 0
        assert 0 < piece.end - piece.start <= every


def test_the_beginning_that_two_texts_share_is_stored_once() -> None:
    same = list(range(100))
    keys = stored([[*same, 1, 2, 3], [*same, 4, 5, 6]], 10)
    assert len(keys) == 10 + 2


def test_a_piece_that_is_gone_ends_what_is_found() -> None:
    text = list(range(100))
    keys = stored([text], 10)
    del keys[next(key for key, tokens in keys.items() if len(tokens) == 40)]
    assert covers(find("p/", tokens_of(text), 10, 100, keys.__contains__)) == 30


def test_no_more_than_asked_is_found() -> None:
    text = list(range(100))
    assert covers(find("p/", tokens_of(text), 10, 99, stored([text], 10).__contains__)) == 90


def test_ids_are_copied() -> None:
    ids = np.arange(4, dtype=np.intc)
    tokens = tokens_of(ids)
    ids[0] = 7
    assert tokens.tolist() == [0, 1, 2, 3]


def test_pieces_of_another_length_are_others() -> None:
    text = list(range(100))
    first = {piece.key: piece for piece in pieces_of("p/", tokens_of(text), 10, {100})}
    for piece in pieces_of("p/", tokens_of(text), 25, {100}):
        assert first.get(piece.key, piece) == piece
    # One that is the same is stored once.
    assert {piece.key for piece in pieces_of("p/", tokens_of(text[:10]), 25, {10})} <= first.keys()
    assert find("p/", tokens_of(text), 25, 100, first.__contains__) == [
        Piece(0, 10, next(iter(first)))
    ]
