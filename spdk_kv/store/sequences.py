"""The sequences of one open store: a name belongs to one sequence at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import NamedTuple

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import CorruptionError, KeyNotFound, NameInUse, ShapeMismatch, SpdkKvError
from spdk_kv.index import Index, SequenceRecord
from spdk_kv.sequence import Host, Sequence, create_sequence, restore_sequence
from spdk_kv.store.records import Records, shown
from spdk_kv.types import Granularity, KVShape

LeftOut = list[tuple[Sequence, Exception]]
"""Sequences that could not be staged, and why."""


class _Making:
    """Has a name while its sequence is created or restored, which may block on the drive."""

    def __init__(self) -> None:
        self.over = threading.Event()


class _Bound(NamedTuple):
    """Has a name as long as it is referred to. ``release_units`` does not refer to it."""

    sequence: weakref.ref[Sequence]
    release_units: Callable[[], None]


class OpenSequences:
    """Sequences by name. Thread-safe. Those in ``records`` are restored when they are asked for.

    A name is free, or it is being made, or it belongs to a live sequence. It is free again, and
    the record gone, as soon as that one's delete() has begun, in one step under ``_lock``: nobody
    restores a sequence whose extents are about to be freed, and the rest of an old delete() cannot
    touch a new sequence. ``_lock`` is taken before the records' lock, and never held over I/O.

    A sequence that is temporary, or has changes that no record has, is kept in memory; any other
    one leaves it with the last reference that somebody else holds, and is restored when it is asked
    for again.

    It does not hold the store: a store that nobody uses any more must be closed at once, not by
    the garbage collector.
    """

    def __init__(self, records: Records, index: Index | None) -> None:
        self._records = records
        self._index = index
        self._bound: dict[str, _Bound | _Making] = {}
        self._kept: dict[str, Sequence] = {}
        # Reentrant, because a finalizer that deletes a sequence may run anywhere.
        self._lock = threading.RLock()
        # Held while all are staged, so that who needs one to leave memory finds it staged. Nobody
        # who holds a sequence's lock waits for it.
        self._staging = threading.RLock()
        records.uses.is_in_use = self.is_bound

    def get(
        self,
        store: Host,
        name: str,
        shape: KVShape | None,
        granularity: Granularity | None,
        temporary: bool,
    ) -> Sequence:
        """As :meth:`KVStore.sequence`."""
        if not isinstance(name, str):
            raise TypeError(f"a sequence's name is a str, not {type(name).__name__}")
        sequence = None
        while sequence is None:
            bound = self._owner(name)
            if bound is None:
                sequence = self._make(store, name, shape, granularity or "layer", temporary)
            elif isinstance(bound, _Making):
                bound.over.wait()
            else:
                sequence = bound
        if shape is not None and sequence.shape != shape:
            raise ShapeMismatch(f"sequence {name!r} has {sequence.shape}, not {shape}")
        if granularity is not None and sequence.granularity != granularity:
            raise ShapeMismatch(
                f"sequence {name!r} has granularity {sequence.granularity!r}, not {granularity!r}"
            )
        return sequence

    def add(self, name: str, make: Callable[[], Sequence]) -> Sequence:
        """A sequence that ``make`` makes under a free name. NameInUse."""
        making = _Making()
        with self._lock:
            if self._owner(name) is not None or name in self._records.sequences:
                raise NameInUse(f"there is a sequence {name!r}: delete it, or take another name")
            self._bound[name] = making
        try:
            sequence = make()
            with self._lock:
                self._bound[name] = _Bound(weakref.ref(sequence), sequence.release_units)
                self._kept[name] = sequence
            return sequence
        finally:
            making.over.set()
            self._owner(name)

    def _make(
        self,
        store: Host,
        name: str,
        shape: KVShape | None,
        granularity: Granularity,
        temporary: bool,
    ) -> Sequence | None:
        """Restores or creates the sequence; None where another thread was first."""
        making = _Making()
        try:
            with self._lock:
                if self._owner(name) is not None:
                    return None
                self._bound[name] = making
            record = self._stored(name)
            if record is not None:
                sequence = restore_sequence(store, name, record)
            elif shape is None:
                raise KeyNotFound(f"no sequence {name!r}")
            else:
                sequence = create_sequence(store, name, shape, granularity, temporary)
            with self._lock:
                self._bound[name] = _Bound(weakref.ref(sequence), sequence.release_units)
                if temporary or record is None:
                    self._kept[name] = sequence
            return sequence
        finally:
            # First of all, in case of an interrupt: the next one who asks may try.
            making.over.set()
            self._owner(name)

    def _stored(self, name: str) -> SequenceRecord | None:
        """The whole record of a sequence that has a binding, and so is not evicted from now on."""
        with self._records.lock:
            record = self._records.sequences.get(name)
            self._records.touch_sequence(name)
        if record is None or not record.is_lean:
            return record
        whole = None if self._index is None else self._index.load_sequence(name)
        if whole is None:
            raise CorruptionError(f"the index has lost sequence {name!r}")
        return replace(whole, life=record.life)

    def note(self, name: str) -> bytes | None:
        """The note of a recorded sequence; None if there is none of that name."""
        record = self._records.sequences.get(name)
        if record is not None and record.is_lean and self._index is not None:
            record = self._index.load_sequence(name)
        return None if record is None else record.note

    def is_bound(self, name: str) -> bool:
        """Whether it is in memory, or about to be. Needs no lock."""
        return name in self._bound

    def make_idle(self) -> bool:
        """Stages what nobody but this object holds, so that it leaves memory and may be evicted.
        Returns whether some did. Waits for the drive, and for other threads' calls on them; what
        fails is left to the next flush to say."""
        with self._staging:
            before = len(self._bound)
            self._stage_changed([])
            self.open_sequences()
            return len(self._bound) < before

    def _owner(self, name: str) -> Sequence | _Making | None:
        """Who has the name."""
        with self._lock:
            bound = self._bound.get(name)
            if isinstance(bound, _Making):
                if bound.over.is_set():
                    del self._bound[name]  # it came to nothing
                    return None
                return bound
            if bound is None:
                return None
            sequence = bound.sequence()
            if sequence is None:
                # Before anybody is given the same extents: two are never tracked on them at once.
                bound.release_units()
                del self._bound[name]
                self._records.touch_sequence(name)
            elif sequence.deleted:
                self.forget(sequence)
                return None
            return sequence

    def forget(self, sequence: Sequence) -> None:
        """Makes the name of a sequence whose delete() has begun free again, if it still has it."""
        with self._lock:
            bound = self._bound.get(sequence.name)
            if isinstance(bound, _Bound) and bound.sequence() is sequence:
                sequence.forget_record()
                self._records.drop_companions(sequence.name)
                del self._bound[sequence.name]
                self._kept.pop(sequence.name, None)

    def keep(self, sequence: Sequence) -> None:
        """It has changes that no record has, and keeps its name until it is deleted."""
        with self._lock:
            if not sequence.deleted:
                self._kept[sequence.name] = sequence

    def _let_go(self, sequence: Sequence) -> None:
        """Nothing of it would be lost with it, unless it was changed in the meantime."""
        with self._lock:
            if not sequence.dirty and not sequence.temporary:
                self._kept.pop(sequence.name, None)

    def names(self) -> list[str]:
        """All names, those of temporary sequences included."""
        with self._lock:
            live = {sequence.name for sequence in self.open_sequences()}
            with self._records.lock:
                return sorted(live | set(self._records.sequences))

    def open_sequences(self) -> list[Sequence]:
        """Those that were asked for since the store was opened, and not deleted."""
        with self._lock:
            owners = [self._owner(name) for name in list(self._bound)]
        return [owner for owner in owners if isinstance(owner, Sequence)]

    @property
    def dirty(self) -> bool:
        """Whether one has something to commit."""
        with self._lock:
            return any(sequence.dirty for sequence in self._kept.values())

    def stage(self, left_out: LeftOut, deadline: Deadline = NEVER) -> None:
        """Stages all of them for the next commit. Adds the failures to ``left_out`` instead of
        raising them: a sequence that lost tokens must not keep the rest back."""
        with deadline.hold(self._staging, "a flush"):
            self._stage_changed(left_out, deadline)
            self.open_sequences()  # which buries those that have left memory

    def _stage_changed(self, left_out: LeftOut, deadline: Deadline = NEVER) -> None:
        with self._lock:
            names = [name for name, each in self._kept.items() if not each.temporary]
        for name in names:
            # One at a time: what is recorded leaves memory at once, if nobody else holds it.
            with self._lock:
                sequence = self._kept.get(name)
            if sequence is None:
                continue
            try:
                sequence.stage_for_commit(deadline)
                self._let_go(sequence)
            except Exception as failure:  # of whatever kind: it is this sequence's alone
                left_out.append((sequence, failure))

    def delete_temporary(self) -> None:
        """Deletes those that end with the store."""
        for sequence in self.open_sequences():
            if sequence.temporary:
                sequence.delete()


def report(left_out: LeftOut, audience: str) -> None:
    """Raises one error for all sequences whose failure ``audience`` was not told of yet: of the
    first one's type, with the names."""
    news = [(s.name, failure) for s, failure in left_out if s.is_news(failure, audience)]
    if not news:
        return
    names = ", ".join(shown(name) for name, _ in news[:5])
    more = f" and {len(news) - 5} more" if len(news) > 5 else ""
    first = news[0][1]
    error = copy(first) if isinstance(first, SpdkKvError) else SpdkKvError()
    error.args = (
        f"sequence {names}{more} could not be recorded, and stays as it was when it last was; "
        f"everything else is safe. {first}",
    )
    raise error from first
