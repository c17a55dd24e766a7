"""Texts, and the notes that they are stored in."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import pytest

from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.note import Note, decode, encode, pack_identity
from spdk_kv.integrations.transformers.text import PADDING, Ids, Text, common_tokens

IDENTITY = Identity("aa", {"rope": {"theta": 1e4}}, "bfloat16", (None, 40), (), "täg", "5.24.0")


def ids(tokens: int, rows: int = 1, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, 150_000, (tokens, rows)).astype("<u4")


@pytest.mark.parametrize("rows", [1, 3])
def test_random_changes_leave_what_a_list_would(rows: int) -> None:
    rng = random.Random(rows)
    text, plain, given = Text.empty(rows), ids(0, rows), []
    for step in range(300):
        given.append((text.ids, plain))
        action = rng.randrange(8)
        if action == 0:
            at = rng.randrange(len(plain) + 2)
            assert text.cut(at) == (at < len(plain))
            plain = plain[:at]
        elif action == 1:
            order = [rng.randrange(rows) for _ in range(rows)]
            text.select(order)
            plain = plain[:, order]
        else:
            new = ids(rng.choice([1, 1, 5, 300]), rows, step)
            text.extend(new)
            plain = np.concatenate([plain, new])
        assert len(text) == len(plain)
        assert np.array_equal(text.ids, plain)
        assert text.crc == zlib.crc32(plain.tobytes())
    for seen, wanted in given:  # what was handed out stays as it was
        assert np.array_equal(seen, wanted)


def test_padding_is_counted_for_each_row() -> None:
    some = ids(9, 3)
    some[:4, 1] = some[:7, 2] = PADDING
    assert Text(some).padding.tolist() == [0, 4, 7]


def test_common_tokens_end_where_any_row_differs() -> None:
    some = ids(50, 3)
    assert common_tokens(some, some[:30]) == common_tokens(some[:30], some) == 30
    other = some.copy()
    other[17, 2] += 1
    assert common_tokens(some, other) == 17
    assert common_tokens(some, some[:, :2]) == 0
    assert common_tokens(some, ids(50, 3, seed=1)) == 0


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (1, 1), (1000, 3)])
def test_note_is_read_as_it_was_written(tokens: int, rows: int) -> None:
    note = Note(IDENTITY, ids(tokens, rows), 7, 1e9)
    found = decode(note.encode())
    assert found is not None
    assert (found.identity, found.hits, found.used_s) == (IDENTITY, 7, 1e9)
    assert np.array_equal(found.ids, note.ids)
    again = found.used_again(2e9)
    assert (again.hits, again.used_s) == (8, 2e9)


def test_a_note_that_is_damaged_anywhere_is_none() -> None:
    note = Note(IDENTITY, ids(40, 2)).encode()
    for at in range(len(note)):
        damaged = bytearray(note)
        damaged[at] ^= 1 << at % 8
        assert decode(bytes(damaged)) is None
    assert all(decode(note[:at]) is None for at in range(len(note)))
    assert decode(note + b"x") is None


@pytest.mark.parametrize("fields", [{}, {"weights": 1}, [], None, {**IDENTITY.to_json(), "new": 1}])
def test_a_note_of_another_release_is_none(fields: Any) -> None:
    class Other:
        def to_json(self) -> Any:
            return fields

    assert decode(encode(pack_identity(Other()), Text(ids(4)))) is None  # type: ignore[arg-type]
    assert decode(b"") is None
    assert decode(b"KVNOTE02" + Note(IDENTITY, ids(4)).encode()[8:]) is None


def test_a_token_takes_four_bytes() -> None:
    # The rest is the model's identity, the same for all: less than a kilobyte for a real one.
    small, large = Note(IDENTITY, ids(1)).encode(), Note(IDENTITY, ids(1001)).encode()
    assert len(large) - len(small) == 4000
