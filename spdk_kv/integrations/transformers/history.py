"""Notes beside a sequence which text it holds, at each moment of every forward pass."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager

import numpy as np

from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.note import Note, encode, pack_identity
from spdk_kv.integrations.transformers.text import Text
from spdk_kv.integrations.transformers.watch import Pass
from spdk_kv.sequence import Sequence

log = logging.getLogger(__name__)


class History:
    """The text of one sequence, noted with it before the sequence has it.

    A record may be made at any moment, so the note always covers at least what is known of what
    the layers hold: it is changed before tokens are appended, and after they are gone.

    Attributes:
        identity: The model's.
        text: The tokens, as far as they are known.
        why_unknown: Why the text ends before the sequence does, if it does.
        epoch: Another number after every change of what was there, and not only more tokens.
        passes: Another number after every beginning of a forward pass.
    """

    def __init__(self, identity: Identity, text: Text | None = None, hits: int = 0) -> None:
        self.identity = identity
        self.text = text or Text.empty()
        self.why_unknown = ""
        self.epoch = 0
        self.passes = 0
        self._completed = True
        self._failed = False
        self._packed = pack_identity(identity)
        self._hits = hits
        self._coming: Pass | None = None
        self._entered: tuple[int, int] | None = None
        self._noted: weakref.ref[Sequence] | None = None

    # -- a forward pass -------------------------------------------------------------------------

    def announce(self, coming: Pass) -> None:
        """The tokens that are appended next are those of ``coming``."""
        self.passes += 1
        # What a failed pass has left half-way, no later one makes whole; only the next beginning.
        self._failed = coming.past > 0 and (self._failed or not self._completed)
        self._completed = False
        self._coming, self._entered = coming, None

    def complete(self) -> None:
        """The pass has come to its end, and raised nothing."""
        self._completed = True

    @property
    def settled(self) -> bool:
        """Whether no pass is under way, and none since the beginning of the text failed."""
        return self._completed and not self._failed and self._coming is None

    def retract(self) -> None:
        """The pass is over: tokens that are appended now are not known."""
        self._coming = self._entered = None

    def before_append(self, sequence: Sequence, past: int, count: int, rows: int) -> None:
        """Notes what a layer of ``sequence`` that has ``past`` tokens is about to be given."""
        if self._entered == (past, count):  # with an earlier layer
            if not self._is_noted(sequence):  # which lay in another sequence
                self.note(sequence)
            return
        coming, why = self._coming, "tokens came without a forward pass of the model"
        if coming is not None:
            self._entered = past, count
            why = coming.why
        lost = self._cut(past)
        if (
            coming is None
            or coming.ids is None
            or (coming.past, coming.ids.shape) != (past, (count, rows))
            or not self._follows(coming, rows)
        ):
            if len(self.text) == past:
                self.why_unknown = why or "padding, rows or tokens do not go on from those before"
            if lost or not self._is_noted(sequence):
                self.note(sequence)
            return
        self.text.extend(coming.ids)
        self.note(sequence)

    def _follows(self, coming: Pass, rows: int) -> bool:
        """Whether the tokens of ``coming`` go on from the text."""
        if coming.past == 0:
            self.text = Text.empty(rows)
            self.why_unknown = ""
            return True
        return (
            len(self.text) == coming.past
            and self.text.rows == rows
            and np.array_equal(self.text.padding, coming.padding)
        )

    # -- changes --------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While tokens are taken from the end. What is left is cut off at the next pass."""
        self.epoch += 1
        text, self.text = self.text, Text.empty(self.text.rows)
        try:
            yield
        finally:
            self.text = text

    def cut(self, sequence: Sequence, tokens: int) -> None:
        """``sequence`` has ``tokens`` left."""
        if self._cut(tokens):
            self.note(sequence)

    def _cut(self, tokens: int) -> bool:
        lost = self.text.cut(tokens)
        self.epoch += lost
        return lost

    def forget(self, sequence: Sequence | None) -> Text:
        """Nothing is known of ``sequence`` until :meth:`select`. Returns the text so far."""
        self.epoch += 1
        text, self.text = self.text, Text.empty(self.text.rows)
        self.why_unknown = "a change of the batch was interrupted"
        if sequence is not None:
            self.note(sequence)
        return text

    def select(self, sequence: Sequence | None, text: Text, rows: Rows[int]) -> None:
        """``sequence`` has ``rows`` of the batch that had ``text``."""
        text.select(rows)
        self.text, self.why_unknown = text, ""
        if sequence is not None:
            self.note(sequence)

    # -- the note -------------------------------------------------------------------------------

    def note(self, sequence: Sequence) -> None:
        """Puts the text beside ``sequence``, if that lasts."""
        if not sequence.temporary:
            sequence.note = encode(self._packed, self.text, self._hits, time.time())
        self._noted = weakref.ref(sequence)

    def as_note(self) -> Note:
        """The note as it is now."""
        return Note(self.identity, self.text.ids, self._hits, time.time())

    def _is_noted(self, sequence: Sequence) -> bool:
        return self._noted is not None and self._noted() is sequence
