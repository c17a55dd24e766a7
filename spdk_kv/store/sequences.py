"""The sequences of one open store: one object per name, however often it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import KeyNotFound, ShapeMismatch, SpdkKvError
from spdk_kv.index import SequenceRecord
from spdk_kv.sequence import Host, Sequence, create_sequence, restore_sequence
from spdk_kv.types import Granularity, KVShape


class OpenSequences:
    """Sequences by name. Thread-safe. ``recorded``: those that the store's index names.

    It does not hold the store: a store that nobody uses any more must be closed at once, not by
    the garbage collector.
    """

    def __init__(self, recorded: Mapping[str, SequenceRecord]) -> None:
        self._recorded = recorded
        self._open: dict[str, Sequence] = {}
        self._lock = threading.Lock()

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
        with self._lock:
            sequence = self._open.get(name)
            if sequence is None or sequence.deleted:
                record = self._recorded.get(name)
                if record is not None:
                    sequence = restore_sequence(store, name, record)
                elif shape is None:
                    raise KeyNotFound(f"no sequence {name!r}")
                else:
                    sequence = create_sequence(
                        store, name, shape, granularity or "layer", temporary
                    )
                self._open[name] = sequence
        if shape is not None and sequence.shape != shape:
            raise ShapeMismatch(f"sequence {name!r} has {sequence.shape}, not {shape}")
        if granularity is not None and sequence.granularity != granularity:
            raise ShapeMismatch(
                f"sequence {name!r} has granularity {sequence.granularity!r}, not {granularity!r}"
            )
        return sequence

    def names(self) -> list[str]:
        """All names, those of temporary sequences included."""
        with self._lock:
            return sorted({*self._recorded, *self._open})

    def open_sequences(self) -> list[Sequence]:
        """Those that were asked for since the store was opened."""
        with self._lock:
            return list(self._open.values())

    def forget(self, sequence: Sequence) -> None:
        """Makes the name of a deleted sequence free again."""
        with self._lock:
            if self._open.get(sequence.name) is sequence:
                del self._open[sequence.name]

    @property
    def dirty(self) -> bool:
        """Whether one has something to commit. Takes no lock: a create may hold it for long."""
        return any(sequence.dirty for sequence in list(self._open.values()))

    def stage(self, deadline: Deadline = NEVER) -> SpdkKvError | None:
        """Stages all of them for the next commit. Returns the first failure instead of raising it:
        a sequence that lost tokens must not keep the rest back."""
        failed = None
        for sequence in self.open_sequences():
            try:
                sequence.stage_for_commit(deadline)
            except SpdkKvError as failure:
                failed = failed or failure
        return failed

    def delete_temporary(self) -> None:
        """Deletes those that end with the store."""
        for sequence in list(self._open.values()):
            if sequence.temporary:
                sequence.delete()
