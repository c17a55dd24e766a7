"""The calls of a store that are about sequences."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

from spdk_kv.errors import KeyNotFound
from spdk_kv.sequence import Host, Sequence
from spdk_kv.store.records import Records
from spdk_kv.store.sequences import OpenSequences
from spdk_kv.types import Granularity, KVShape


class SequenceCalls(ABC):
    """A part of :class:`KVStore`."""

    _records: Records
    _sequences: OpenSequences

    @abstractmethod
    def check_open(self) -> None: ...

    def sequence(
        self,
        name: str,
        shape: KVShape | None = None,
        *,
        granularity: Granularity | None = None,
        temporary: bool = False,
    ) -> Sequence:
        """The sequence called ``name``; created, with room for all its tokens, if it is new.

        Args:
            name: Any text. The same object comes back for the same name, as long as somebody holds
                it; with the last reference a sequence whose tokens are recorded leaves memory.
            shape: Needed to create; where the sequence exists, it must match.
            granularity: What lies contiguously: ``"layer"`` (the default) a layer's K, and its V;
                ``"head"`` those of one KV head; ``"token"`` K and V of each token of a row of the
                batch, for :meth:`Sequence.read_groups`. Where the sequence exists, it must match.
            temporary: The sequence goes away when the store is closed, and flushes pass it by.

        Returns:
            The sequence. Creating one may block on the drive, to make room.

        Raises:
            KeyNotFound: There is no such sequence, and no ``shape`` to create it.
            ShapeMismatch: It has another shape or granularity.
            CapacityError: There is no room for it.
            ReadOnlyStore: There is none, and the store is open ``read_only``.
            ClosedError: The store is closed.
        """
        self.check_open()
        return self._sequences.get(cast(Host, self), name, shape, granularity, temporary)

    def sequences(self) -> list[str]:
        """The names of all sequences, temporary ones included. Does not block."""
        self.check_open()
        return self._sequences.names()

    def sequence_note(self, name: str) -> bytes:
        """The note of a recorded sequence (:attr:`Sequence.note`), which is not restored for that.
        May block on the disk of the index.

        Raises:
            KeyNotFound: There is no such sequence, or no record of it yet.
        """
        self.check_open()
        note = self._sequences.note(name)
        if note is None:
            raise KeyNotFound(f"no sequence {name!r} is recorded")
        return note

    def adopt_fork(
        self, parent: str, name: str | None, make: Callable[[str, bool], Sequence]
    ) -> Sequence:
        """Called by :meth:`Sequence.fork`: what ``make(name, temporary)`` returns belongs to the
        store. NameInUse."""
        self.check_open()
        if name is not None and not isinstance(name, str):
            raise TypeError(f"a sequence's name is a str, not {type(name).__name__}")
        own = f"{parent}/fork-{uuid.uuid4().hex}" if name is None else name
        return self._sequences.add(own, lambda: make(own, name is None))

    def forget_sequence(self, sequence: Sequence) -> None:
        """Called by :meth:`Sequence.delete`: the name is free again."""
        self._sequences.forget(sequence)

    def keep_sequence(self, sequence: Sequence) -> None:
        """Called by a sequence that has just noted a change: it stays in memory until that is
        recorded."""
        self._sequences.keep(sequence)
