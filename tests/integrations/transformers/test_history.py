"""The note of a sequence says nothing wrong of its tokens, wherever an interrupt comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spdk_kv.integrations.transformers.history import History
from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.note import decode
from spdk_kv.integrations.transformers.stream import LayerStream, StreamOptions
from spdk_kv.integrations.transformers.text import Ids
from spdk_kv.integrations.transformers.watch import Pass
from spdk_kv.store import KVStore
from support.interrupts import interrupted_everywhere
from support.rounds import rounds

# An interrupt may come within a finalizer, where Python reports it and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LAYERS, ROWS, PAST, NEW = 3, 2, 60, 40
IDENTITY = Identity("aa", {}, "float32", (None,) * LAYERS, (), None, "5.24.0")


class Noted:
    """A stream with its history, whose K is the token's number."""

    def __init__(self, store: KVStore) -> None:
        self.history = History(IDENTITY)
        options = StreamOptions((None,) * LAYERS, None, 2, "chat", "layer")
        self.stream = LayerStream(store, options)
        self.stream.before_append = self.history.before_append
        self.given = 0

    def run_pass(self, count: int, widths: tuple[int, ...] = (64,) * LAYERS) -> None:
        past = self.stream.tokens(0)
        ids = np.arange(self.given, self.given + ROWS * count).reshape(count, ROWS).astype("<u4")
        self.given += ROWS * count
        self.history.announce(Pass(past, ids, np.zeros(ROWS, "<u4")))
        for layer, width in enumerate(widths):
            k = torch.tensor(ids.T.astype("f4")).view(ROWS, 1, count, 1).expand(-1, 2, -1, width)
            self.stream.update(layer, k, -k)
        self.history.retract()

    def crop(self, count: int) -> None:
        with self.history.changing():
            self.stream.truncate(count)
        if self.stream.sequence is not None:
            self.history.cut(self.stream.sequence, self.stream.tokens(0))

    def reorder(self, rows: list[int]) -> None:
        text = self.history.forget(self.stream.sequence)
        self.stream.select(rows)
        self.history.select(self.stream.sequence, text, rows)

    def check(self) -> Ids:
        """What is noted is there, in every layer. Returns it."""
        sequence = self.stream.sequence
        assert sequence is not None
        note = decode(sequence.note)
        assert note is not None
        for layer in range(LAYERS):
            k, _ = sequence.read(layer)
            there = k[:, 0, :, 0].T.numpy().astype("<u4")
            count = min(len(note.ids), len(there))
            assert np.array_equal(note.ids[:count], there[:count])
        return note.ids


@pytest.mark.parametrize("change", ["crop", "reorder"])
def test_what_is_noted_is_there_wherever_an_interrupt_comes(store: KVStore, change: str) -> None:
    noted = Noted(store)

    def prepare(at: int) -> None:
        noted.stream.clear()
        noted.run_pass(PAST)

    def run(at: int) -> None:
        noted.run_pass(NEW)
        noted.crop(25) if change == "crop" else noted.reorder([1, 0])
        noted.run_pass(5)

    def check(at: int) -> None:
        noted.check()
        noted.crop(0)
        noted.run_pass(3)
        noted.check()
        known = noted.check()
        assert change == "reorder" or len(known) == noted.stream.tokens(0)

    interrupted_everywhere(prepare, run, check, step=rounds(61, 13))
    prepare(0)
    run(0)
    assert len(noted.check()) == noted.stream.tokens(0)


def test_rows_that_an_interrupted_reordering_has_changed_are_not_noted(store: KVStore) -> None:
    noted = Noted(store)
    noted.run_pass(PAST)
    text = noted.history.forget(noted.stream.sequence)
    assert len(noted.check()) == 0
    noted.stream.select([1, 1])
    noted.history.select(noted.stream.sequence, text, [1, 1])
    assert len(noted.check()) == PAST


def test_a_sequence_made_anew_amid_the_first_pass_is_noted(store: KVStore) -> None:
    # Its layers turn out to be of another width than the first one.
    noted, widths = Noted(store), (64, 32, 48)
    noted.run_pass(PAST, widths)
    assert len(noted.check()) == PAST
    noted.run_pass(NEW, widths)
    assert len(noted.check()) == PAST + NEW
