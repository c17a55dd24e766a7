"""Which texts a store holds, for each fingerprint: found by their beginning, read to be sure."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from spdk_kv.errors import CorruptionError, KeyNotFound
from spdk_kv.integrations.transformers.lifetime import outside_inference
from spdk_kv.integrations.transformers.note import Note, decode
from spdk_kv.integrations.transformers.prefixes import Prefixes, StoredPrompt
from spdk_kv.integrations.transformers.text import Ids, common_tokens
from spdk_kv.store import KVStore

# Of texts that are held while a table is filled, so that each is read once.
_HELD_NBYTES = 64 << 20


class Table:
    """The texts that one store holds of one fingerprint. Thread-safe.

    The texts themselves are read from the store, and no lock is held meanwhile. Whatever turns out
    to be gone, or another text, is dropped.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._prefixes = Prefixes()
        self._lock = threading.Lock()
        self._loaded = False

    def load(self, store: KVStore) -> None:
        """Takes in what is stored, the first time. Reads the notes of all sequences."""
        if self._loaded:
            return
        held: dict[str, Note] = {}
        nbytes = 0

        def read(store: KVStore, name: str) -> Note | None:
            return held.get(name) or self._recorded(store, name)

        for name in store.sequences():
            note = self._recorded(store, name)
            if note is None:
                continue
            self._add(store, name, note, read)
            if nbytes < _HELD_NBYTES:
                held[name] = note
                nbytes += note.ids.nbytes
        self._loaded = True

    def read(self, store: KVStore, name: str) -> Note | None:
        """The note of ``name`` as it is now; None unless it is a text of one row with this
        fingerprint. Blocks on the drive where the sequence has to be restored."""
        try:
            return self._fitting(outside_inference(lambda: store.sequence(name)).note)
        except (KeyNotFound, CorruptionError):
            return None

    def _recorded(self, store: KVStore, name: str) -> Note | None:
        """The note of ``name`` that is recorded, or the one that it has if none is."""
        try:
            return self._fitting(store.sequence_note(name))
        except KeyNotFound:
            return self.read(store, name)

    def _fitting(self, stored: bytes) -> Note | None:
        note = decode(stored)
        if note is None or note.ids.shape[1] != 1 or not len(note.ids):
            return None
        return note if note.identity.fingerprint == self._fingerprint else None

    def longest(self, store: KVStore, ids: Ids) -> tuple[str, Ids] | None:
        """The text that begins with more of ``ids``, ``[tokens, 1]``, than any other, and what it
        has of them; None where no text has any."""
        while True:
            with self._lock:
                name = self._prefixes.candidate(ids)
            if name is None:
                return None
            note = self.read(store, name)
            with self._lock:
                if note is None or not self._prefixes.is_still(name, note.ids):
                    self._prefixes.remove(name)
                    continue
            count = common_tokens(note.ids, ids)
            return (name, note.ids[:count]) if count else None

    def add(self, store: KVStore, name: str, note: Note) -> None:
        """Takes in ``name``, in place of what it was before."""
        self._add(store, name, note, self.read)

    def _add(
        self, store: KVStore, name: str, note: Note, read: Callable[[KVStore, str], Note | None]
    ) -> None:
        while True:
            self.remove(name)
            with self._lock:
                version, nearest = self._prefixes.version, self._prefixes.candidate(note.ids)
            other = None if nearest is None else read(store, nearest)
            with self._lock:
                if version != self._prefixes.version:
                    continue
                if nearest is None:
                    text = None
                elif other is not None and self._prefixes.is_still(nearest, other.ids):
                    text = other.ids[: self._prefixes.tokens(nearest)]
                else:
                    self._prefixes.remove(nearest)
                    continue
                self._prefixes.add(name, note.ids, text, note.hits, note.used_s)
                return

    def remove(self, name: str) -> None:
        with self._lock:
            self._prefixes.remove(name)

    def hit(self, name: str, now_s: float) -> None:
        with self._lock:
            self._prefixes.hit(name, now_s)

    def texts(self) -> list[StoredPrompt]:
        with self._lock:
            return self._prefixes.texts()


_lock = threading.Lock()
_tables: weakref.WeakKeyDictionary[KVStore, dict[str, Table]] = weakref.WeakKeyDictionary()


def table_of(store: KVStore, fingerprint: str) -> Table:
    """The table of ``fingerprint``, made and filled if there is none."""
    with _lock:
        tables = _tables.setdefault(store, {})
        table = tables.setdefault(fingerprint, Table(fingerprint))
    table.load(store)
    return table


def tell(store: KVStore, name: str, note: Note) -> None:
    """``name`` holds the text of ``note`` and stays, for now: for the table, if there is one."""
    with _lock:
        table = _tables.get(store, {}).get(note.identity.fingerprint)
    if table is not None and note.ids.shape[1] == 1 and len(note.ids):
        table.add(store, name, note)
