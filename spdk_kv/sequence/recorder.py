"""What makes a sequence last: its record in the index, and when a newer one has to be made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import SpdkKvError
from spdk_kv.index import PieceRecord, SequenceRecord
from spdk_kv.sequence.body import Body
from spdk_kv.sequence.host import Records
from spdk_kv.sequence.layer import Layer


class Recorder:
    """Makes the records of a sequence. A ``temporary`` one has none.

    After a crash the last committed record still has to find its bytes on the drive. Where tokens
    that it covers were forgotten since, nothing may be written in their place before a newer record
    is committed: :attr:`must_record`.
    """

    def __init__(
        self,
        records: Records,
        name: str,
        body: Body,
        temporary: bool,
        life: object = None,
    ) -> None:
        self.note = b""
        """What the caller wants to be recorded with the tokens."""
        self.pinned = False
        """Whether it is kept from eviction."""
        self.temporary = temporary
        self.life = life or object()
        """What its records have in common; see :class:`SequenceRecord`."""
        self.deleted = False
        """Set under ``lock``; nothing is recorded from then on."""
        # The last change, and the last one that a staged record has. Not a flag: a change that
        # comes while a record is made would be lost with it.
        self._change: object = None
        self._staged: object = None
        self.must_record = False
        self.lock = threading.RLock()
        """Held while a record is made and while one is overtaken (truncate, delete). Taken before
        any layer's lock."""
        self._records = records
        self._name = name
        self._body = body
        self._layout = body.layout
        self._growth = body.growth
        # Tokens of each layer that the last record covers.
        self._recorded = [0] * body.layout.shape.layers
        # Runs that only the last record names, until the next one is published.
        self._leaving: list[int] = []
        # What stage() raised when somebody was last told of it.
        self._told: dict[str, Exception] = {}

    @property
    def dirty(self) -> bool:
        """Whether there are changes that no staged record has."""
        return self._change is not self._staged

    def mark_dirty(self) -> None:
        """Notes a change that is about to be made, with the layer's lock held."""
        if not self.temporary:
            self._change = object()

    def mark_recorded(self) -> None:
        """The last record covers all tokens that the layers have now."""
        self._recorded = [layer.tokens for layer in self._body.layers]

    @contextmanager
    def forgetting(self, number: int, tokens: int) -> Iterator[None]:
        """For a truncation of layer ``number`` to ``tokens``, which changes nothing if it raises
        SpdkKvError. With ``lock`` and the layer's lock held."""
        before = self.must_record
        self.must_record |= tokens < self._recorded[number]
        try:
            yield
        except SpdkKvError:
            self.must_record = before
            raise

    def stage(self, deadline: Deadline = NEVER) -> None:
        """Writes what is only in memory and gives the index the record for its next commit, if
        anything changed. Waits for the drive; raises the errors of writes."""
        with deadline.hold(self.lock):
            if self.temporary or self.deleted or not self.dirty:
                return
            change = self._change
            self._stage(deadline)
            self._staged = change

    def is_news(self, failure: Exception, audience: str) -> bool:
        """Whether ``audience`` was not told yet of ``failure``, which :meth:`stage` raised; it is
        from now on. A layer that is lost raises the same object each time, and each new attempt
        that fails another one."""
        is_news = self._told.get(audience) is not failure
        self._told[audience] = failure
        return is_news

    def _stage(self, deadline: Deadline) -> None:
        record, covered = self._record(deadline)
        # First what guards the record, in case an interrupt comes between the two.
        self._recorded = covered
        self._records.publish_sequence(self._name, record)
        self._records.retire(self.take_leaving())

    def _record(self, deadline: Deadline) -> tuple[SequenceRecord, list[int]]:
        """The record, and how many tokens of each layer it covers."""
        checksums: list[bytes] = []
        maps: list[bytes] = []
        covered: list[int] = []
        note, layers = self.note, self._body.layers
        for number, layer in enumerate(layers):
            while not self._flush(layer, checksums, maps, covered, deadline):
                self._growth.extend(layers, number, layer.tokens, deadline, may_stage=False)
        with deadline.hold(self._growth.lock):
            pieces = [PieceRecord(*each) for each in self._growth.recordable()]
            self._leaving += self._growth.take_left()
        layout = self._layout
        if any(maps):
            own = np.arange(layout.shape.batch, dtype="<i4")
            maps = [
                found or np.tile(own, (tokens, 1)).tobytes()
                for found, tokens in zip(maps, covered, strict=True)
            ]
        record = SequenceRecord(
            layout.shape,
            layout.granularity,
            layout.chunk_nbytes,
            tuple(pieces),
            tuple(covered),
            tuple(checksums),
            b"".join(maps),
            note,
            self.pinned,
            self.life,
        )
        return record, covered

    def _flush(
        self,
        layer: Layer,
        checksums: list[bytes],
        maps: list[bytes],
        covered: list[int],
        deadline: Deadline,
    ) -> bool:
        """Adds what a record says of ``layer``; False where its tail has no room on the drive."""
        with deadline.hold(layer.lock):
            if not layer.has_room(layer.tokens):
                return False
            checksums += layer.flush(deadline)
            maps.append(layer.row_map())
            covered.append(layer.tokens)
            return True

    def take_leaving(self) -> list[int]:
        """The runs that only records before the last published one name."""
        leaving, self._leaving = self._leaving, []
        return leaving

    def commit_if_due(self, deadline: Deadline = NEVER) -> None:
        """Commits a record of what is left, if the last one covers tokens forgotten since."""
        with deadline.hold(self.lock):
            if self.must_record:
                self.stage(deadline)
                self._records.commit(deadline.left_s())
                self._records.settle(deadline.left_s())
                self.must_record = False
