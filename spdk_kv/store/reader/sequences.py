"""The sequences of a store that is open to be read only."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from spdk_kv.errors import (
    KeyNotFound,
    ReadOnlyStore,
    ShapeMismatch,
    SpdkKvError,
    is_unreadable,
)
from spdk_kv.index import SequenceRecord
from spdk_kv.sequence import GroupReading, Host, Sequence, restore_sequence
from spdk_kv.store.reader.records import ReadRecords
from spdk_kv.types import Granularity, KVShape

if TYPE_CHECKING:
    import torch

# A writer commits between two changes of what it has recorded, so this many within one call is more
# than any that is of use.
_ATTEMPTS = 16


class _State(NamedTuple):
    """What a reader has of a sequence: as of ``record``, which :meth:`KVStore.refresh` number
    ``epoch`` found."""

    restored: Sequence
    record: SequenceRecord
    epoch: int


class SequenceReader(Sequence):
    """A sequence as of one flush of its writer; :meth:`KVStore.sequence` makes one.

    It stays at that state, all layers of it, until :meth:`KVStore.refresh`. What its writer appends
    does not disturb it. Where the writer has truncated or deleted what is read here, and has
    written other tokens there, the read raises KeyNotFound: treat it as a cache miss, or call
    :meth:`KVStore.refresh` and read again. Calls that would change it raise ReadOnlyStore.
    """

    def __init__(self, host: Host, name: str, sequences: ReadSequences) -> None:
        self.name = name
        self._host = host
        self._sequences = sequences
        self._state = sequences.restore(host, name)

    def _now(self) -> _State:
        """Its state, after the last refresh."""
        self._host.check_open()
        if self._state.epoch != self._sequences.epoch:
            self._state = self._sequences.restore(self._host, self.name, self._state)
            self._sequences.bury()
        return self._state

    # -- properties -----------------------------------------------------------------------------

    @property
    def shape(self) -> KVShape:
        """As :attr:`Sequence.shape`."""
        return self._state.restored.shape

    @property
    def granularity(self) -> Granularity:
        """As :attr:`Sequence.granularity`."""
        return self._state.restored.granularity

    @property
    def temporary(self) -> bool:
        """False: such a sequence is its writer's alone."""
        return False

    @property
    def deleted(self) -> bool:
        """False: a reader does not delete."""
        return False

    @property
    def dirty(self) -> bool:
        """False: a reader changes nothing."""
        return False

    @property
    def nbytes(self) -> int:
        """As :attr:`Sequence.nbytes`."""
        return self._state.restored.nbytes

    @property
    def pinned(self) -> bool:
        """As :attr:`Sequence.pinned`; not to be set here."""
        return self._state.record.pinned

    @pinned.setter
    def pinned(self, pinned: bool) -> None:
        self._refuse("pinned")

    @property
    def note(self) -> bytes:
        """As :attr:`Sequence.note`, of the same flush as the tokens; not to be set here."""
        return self._now().record.note

    @note.setter
    def note(self, note: bytes) -> None:
        self._refuse("note")

    def tokens(self, layer: int = 0) -> int:
        """As :meth:`Sequence.tokens`, as of the last flush that was taken up."""
        return self._now().restored.tokens(layer)

    @property
    def read_ahead(self) -> bool:
        """As :attr:`Sequence.read_ahead`."""
        return self._state.restored.read_ahead

    @read_ahead.setter
    def read_ahead(self, learns: bool) -> None:
        self._state.restored.read_ahead = learns

    def set_weight(self, layers: Iterable[int], weight: float) -> None:
        """As :meth:`Sequence.set_weight`, for this reader."""
        self._now().restored.set_weight(layers, weight)

    # -- reading --------------------------------------------------------------------------------

    def read(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
        timeout_s: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Sequence.read`. KeyNotFound where the writer has changed since what was to be
        read; CorruptionError where it has not, and the bytes are wrong all the same."""
        state = self._now()
        with self._refusing_changed(state):
            return state.restored.read(
                layer, tokens=tokens, heads=heads, device=device, timeout_s=timeout_s
            )

    def start_groups(
        self, layer: int, groups: Any, group_tokens: int, *, timeout_s: float | None = None
    ) -> GroupReading:
        """As :meth:`Sequence.start_groups`; finishing it fails as :meth:`read` does."""
        state = self._now()
        reading = state.restored.start_groups(layer, groups, group_tokens, timeout_s=timeout_s)
        return reading.guarded(lambda: self._refusing_changed(state))

    @contextmanager
    def _refusing_changed(self, state: _State) -> Iterator[None]:
        try:
            yield
        except SpdkKvError as failure:
            if is_unreadable(failure):
                self._sequences.refuse_if_changed(self.name, state.record, failure)
            raise

    def prefetch(
        self,
        layers: Iterable[int],
        *,
        first_token: int = 0,
        spare_tokens: int = 1,
        timeout_s: float | None = None,
    ) -> None:
        """As :meth:`Sequence.prefetch`."""
        self._now().restored.prefetch(
            layers, first_token=first_token, spare_tokens=spare_tokens, timeout_s=timeout_s
        )

    def settle(self, layer: int, *, timeout_s: float | None = None) -> None:
        """Nothing is written here, so there is nothing to wait for."""
        self._now().restored.settle(layer, timeout_s=timeout_s)

    # -- changing -------------------------------------------------------------------------------

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, timeout_s: float | None = None
    ) -> NoReturn:
        """Raises ReadOnlyStore."""
        self._refuse("append")

    def append_async(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, timeout_s: float | None = None
    ) -> NoReturn:
        """Raises ReadOnlyStore."""
        self._refuse("append_async")

    def truncate(
        self, tokens: int, *, layer: int | None = None, timeout_s: float | None = None
    ) -> NoReturn:
        """Raises ReadOnlyStore."""
        self._refuse("truncate")

    def reorder(
        self, rows: Iterable[int], *, layer: int | None = None, timeout_s: float | None = None
    ) -> NoReturn:
        """Raises ReadOnlyStore."""
        self._refuse("reorder")

    def fork(
        self,
        name: str | None = None,
        *,
        tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> NoReturn:
        """Raises ReadOnlyStore."""
        self._refuse("fork")

    def delete(self) -> NoReturn:
        """Raises ReadOnlyStore."""
        self._refuse("delete")

    def mark_new(self) -> None:
        """A reader makes none."""

    def make_layers(self) -> None:
        """They are there."""

    def restore(self, record: SequenceRecord) -> None:
        """A reader restores another one instead."""

    def forget_record(self) -> None:
        """A reader has none to forget."""

    def stage_for_commit(self, deadline: object = None) -> None:
        """A reader has nothing to commit."""

    def is_news(self, failure: Exception, audience: str) -> bool:
        """Nothing fails to be recorded here."""
        return False

    def _refuse(self, call: str) -> NoReturn:
        self._host.check_open()
        raise ReadOnlyStore(
            f"{call}: sequence {self.name!r} belongs to a store that is open read_only; change it "
            "in the process that writes"
        )


class ReadSequences:
    """Sequences by name, for a reader. Thread-safe.

    ``epoch`` counts the calls of :meth:`KVStore.refresh`: a sequence goes on to a newer state then,
    and not when some other call has found news, so that its layers stay of one state.

    It does not hold the store; see :class:`OpenSequences`.
    """

    def __init__(self, records: ReadRecords) -> None:
        self.epoch = 0
        self._records = records
        self._lock = threading.RLock()
        self._live: weakref.WeakValueDictionary[str, SequenceReader] = weakref.WeakValueDictionary()
        # Everything that was restored, and what ends its tracking.
        self._restored: list[tuple[weakref.ref[Sequence], Callable[[], None]]] = []

    def get(
        self, host: Host, name: str, shape: KVShape | None, granularity: Granularity | None
    ) -> Sequence:
        """As :meth:`KVStore.sequence`."""
        if not isinstance(name, str):
            raise TypeError(f"a sequence's name is a str, not {type(name).__name__}")
        with self._lock:
            found = self._live.get(name)
        if found is None:
            if shape is not None and self._find(name) is None:
                raise ReadOnlyStore(
                    f"there is no sequence {name!r}, and a store that is open read_only creates "
                    "none"
                )
            self.bury()
            made = SequenceReader(host, name, self)
            with self._lock:
                # Where another thread was first, that one's is it.
                found = self._live.setdefault(name, made)
        else:
            found._now()
        if shape is not None and found.shape != shape:
            raise ShapeMismatch(f"sequence {name!r} has {found.shape}, not {shape}")
        if granularity is not None and found.granularity != granularity:
            raise ShapeMismatch(
                f"sequence {name!r} has granularity {found.granularity!r}, not {granularity!r}"
            )
        return found

    def note(self, name: str) -> bytes:
        """As :meth:`KVStore.sequence_note`."""
        record = self._find(name)
        if record is None:
            raise KeyNotFound(f"no sequence {name!r}")
        return record.note

    def _find(self, name: str) -> SequenceRecord | None:
        record = self._records.sequence(name)
        if record is None and self._records.refresh_if_news():
            record = self._records.sequence(name)
        return record

    def restore(self, host: Host, name: str, old: _State | None = None) -> _State:
        """The sequence as it is now, or ``old`` where it did not change. Blocks on the drive.

        KeyNotFound where there is none. CorruptionError where its bytes are wrong, and its writer
        has not changed it meanwhile.
        """
        epoch = self.epoch
        record = self._find(name)
        for _ in range(_ATTEMPTS):
            if record is None:
                raise KeyNotFound(f"no sequence {name!r}")
            if old is not None and old.record == record:
                return old._replace(epoch=epoch)
            try:
                restored = restore_sequence(host, name, record)
            except SpdkKvError as failure:
                if not is_unreadable(failure):
                    raise
                self._records.refresh()
                former, record = record, self._records.sequence(name)
                if record == former:
                    raise
                continue
            with self._lock:
                self._restored.append((weakref.ref(restored), restored.release_units))
            return _State(restored, record, epoch)
        raise KeyNotFound(f"sequence {name!r} changes faster than it can be read")

    def refuse_if_changed(self, name: str, seen: SequenceRecord, failure: SpdkKvError) -> None:
        """KeyNotFound if the sequence is another one by now than ``seen``, which explains why its
        bytes cannot be read."""
        self._records.refresh()
        record = self._records.sequence(name)
        if record != seen:
            what = "deleted" if record is None else "changed"
            raise KeyNotFound(
                f"sequence {name!r} was {what} by its writer since it was opened or refreshed "
                "here; store.refresh() takes that up"
            ) from failure

    def refresh(self) -> None:
        """Open sequences take up the newest state at their next call."""
        with self._lock:
            self.epoch += 1

    def bury(self) -> None:
        """Ends the tracking of those that nobody uses any more."""
        with self._lock:
            dead = [release for sequence, release in self._restored if sequence() is None]
            self._restored = [each for each in self._restored if each[0]() is not None]
        for release in dead:
            release()
