"""Prompts computed once and used by many: the longest stored beginning of any text."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from spdk_kv.errors import CorruptionError, KeyNotFound, ShapeMismatch, StoreMismatch
from spdk_kv.integrations.transformers.cache import OffloadedKVCache
from spdk_kv.integrations.transformers.history import History
from spdk_kv.integrations.transformers.identity import (
    Identity,
    config_of,
    identity_of,
    length_limit,
)
from spdk_kv.integrations.transformers.layers import windows_of
from spdk_kv.integrations.transformers.lifetime import outside_inference
from spdk_kv.integrations.transformers.live import writer_of
from spdk_kv.integrations.transformers.note import Note, decode
from spdk_kv.integrations.transformers.prefixes import StoredPrompt
from spdk_kv.integrations.transformers.refusal import layer_templates
from spdk_kv.integrations.transformers.states import check_stateless
from spdk_kv.integrations.transformers.tables import Table, table_of
from spdk_kv.integrations.transformers.taking_up import RESERVED, ids_of
from spdk_kv.integrations.transformers.text import PADDING, Ids, Text, common_tokens
from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.types import Granularity


class PromptCache:
    """Prompts whose K/V is stored, for one model: computed once, by anyone, and gone on from.

    ::

        prompts = PromptCache(store, model)
        with prompts.open(input_ids) as cache:          # holds what is stored of its beginning
            model.generate(input_ids, cache=cache)      # computes the rest
            prompts.save(cache)                         # for the next one

    What was stored by other caches of the store counts as well, those with a name included, by
    other processes and earlier runs, if the model is the same: configuration, weights, adapters,
    dtype and tag. Other models' prompts are simply not found.

    Thread-safe; the caches that it opens are not. Making the first one for a store reads the notes
    of all its sequences, and all weights.

    Args:
        store: Where the prompts are.
        model: The model, as it is when a cache is opened: adapters may come and go.
        tag: Anything else that K and V depend on.
        max_tokens: As that of :class:`OffloadedKVCache`, of caches that begin empty.
        resident_layers: Likewise, of all.
        granularity: Likewise, of caches that begin empty.

    Raises:
        ShapeMismatch: The model cannot be served.
        StoreMismatch: The weights cannot be read, as on the meta device, or it is no model.
    """

    def __init__(
        self,
        store: KVStore,
        model: nn.Module,
        *,
        tag: str | None = None,
        max_tokens: int | None = None,
        resident_layers: int = 2,
        granularity: Granularity | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "a PromptCache takes the model itself: with a bare configuration its "
                "weights cannot be checked"
            )
        self._store = store
        self._model = model
        self._tag = tag
        self._options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "resident_layers": resident_layers,
            "granularity": granularity,
        }
        self._table(self._identity())

    def open(self, input_ids: torch.Tensor) -> OffloadedKVCache:
        """A cache that holds what is stored of the beginning of ``input_ids``.

        It says how much as ``cache.saved_tokens``: all but the last token at most, which is always
        computed, since ``generate`` needs one. No bytes are copied, but those of an unfinished
        chunk. The cache is gone when it is closed, or with its last reference.

        Args:
            input_ids: ``[1, tokens]`` or ``[tokens]``, without padding.

        Raises:
            ShapeMismatch: It is a batch of several rows.
        """
        ids = ids_of(input_ids)
        if ids.shape[1] != 1:
            raise ShapeMismatch(
                f"a PromptCache opens one text at a time, not a batch of {ids.shape[1]}"
            )
        identity = self._identity()
        table = self._table(identity)
        cache = OffloadedKVCache(self._store, self._model, **self._options)
        limit = length_limit(config_of(self._model))
        found = None
        if limit is None or len(ids) < limit:
            found = self._fork_longest(table, ids[:-1])
        if found is None:
            cache.remember(self._model, History(identity))
        else:
            sequence, ids = found
            cache.remember(self._model, History(identity, Text(ids)), sequence)
        return cache

    def save(
        self, cache: OffloadedKVCache, *, tokens: int | None = None, pin: bool = False
    ) -> StoredPrompt:
        """Makes the text that ``cache`` holds a stored prompt, which later ones begin with.

        Copies nothing but an unfinished chunk, and nothing at all where the same is stored
        already. It survives a crash from the store's next flush on.

        Args:
            cache: One that this object opened, or another one of the same model and store. It goes
                on, and may be closed.
            tokens: Only so many from the beginning.
            pin: It is never evicted to make room. ``store.sequence(name).pinned`` may be set later.

        Raises:
            ShapeMismatch: Its tokens are not known, or they are those of several rows.
            StoreMismatch: It is of another model or store.
        """
        identity, sequence, ids = self._text_of(cache)
        ids = ids[:tokens]
        table = self._table(identity)
        name = _name(identity, ids)
        note = table.read(self._store, name)
        if note is None or not _equal(note.ids, ids):
            self._delete(name)
            note = Note(identity, ids, used_s=time.time())
            fork = outside_inference(lambda: sequence.fork(name, tokens=len(ids)))
            fork.note = note.encode()
        if pin:
            outside_inference(lambda: self._store.sequence(name)).pinned = True
        table.add(self._store, name, note)
        return StoredPrompt(name, len(ids), note.hits, note.used_s)

    def list(self) -> list[StoredPrompt]:
        """What is stored for this model, in the order in which it came."""
        return self._table(self._identity()).texts()

    # -- what is stored -------------------------------------------------------------------------

    def _identity(self) -> Identity:
        config = config_of(self._model)
        templates = layer_templates(config)
        check_stateless(templates, config)
        identity = identity_of(self._model, windows_of(templates), self._tag)
        if identity.weights is None:
            raise StoreMismatch(
                "the weights of the model have no values here, so that nothing can be known to be "
                "of the same model: load them first"
            )
        return identity

    def _table(self, identity: Identity) -> Table:
        return table_of(self._store, identity.fingerprint)

    def _fork_longest(self, table: Table, ids: Ids) -> tuple[Sequence, Ids] | None:
        """A sequence of its own that holds what is stored of ``ids``, and what that is."""
        while (found := table.longest(self._store, ids)) is not None:
            name, known = found
            try:
                fork = self._fork(name, known)
            except (KeyNotFound, CorruptionError):
                fork = None
            if fork is not None:
                table.hit(name, time.time())
                return fork
            table.remove(name)
        return None

    def _fork(self, name: str, ids: Ids) -> tuple[Sequence, Ids] | None:
        """A fork of ``name`` that holds ``ids``, or as many of them as are there; None if it does
        not hold that text (any more)."""
        writer, claims = writer_of(self._store, name)
        history = None if writer is None else writer.history
        epoch = 0 if history is None else history.epoch
        parent = outside_inference(lambda: self._store.sequence(name))
        note = decode(parent.note) if history is None else history.as_note()
        shared = 0 if note is None else common_tokens(note.ids, ids)
        count = min(shared, *(parent.tokens(layer) for layer in range(parent.shape.layers)))
        if not count:
            return None
        child = outside_inference(lambda: parent.fork(tokens=count))
        # Its writer may have changed it meanwhile, or it may have got one.
        same_writer = writer_of(self._store, name) == (writer, claims)
        if not same_writer or (history is not None and history.epoch != epoch):
            child.delete()
            return None
        if name.startswith(RESERVED):
            _count_hit(parent)
        return child, ids[:count]

    def _delete(self, name: str) -> None:
        """Whatever is stored under the name of a prompt and is not that prompt."""
        with suppress(KeyNotFound):
            self._store.sequence(name).delete()

    def _text_of(self, cache: OffloadedKVCache) -> tuple[Identity, Sequence, Ids]:
        history, sequence = cache.history, cache.sequence
        if history is None or sequence is None:
            raise ShapeMismatch("the cache has no tokens, or not been told which: open it here")
        identity = self._identity()
        if cache.store is not self._store:
            raise StoreMismatch("the cache is on another store")
        if differences := identity.differences(history.identity):
            raise StoreMismatch(f"the cache is of another model: {'; '.join(differences)}")
        held = min(sequence.tokens(layer) for layer in range(sequence.shape.layers))
        ids = history.text.ids[:held]
        if ids.shape[1] != 1 or (ids == PADDING).any():
            raise ShapeMismatch(
                f"a stored prompt is one text without padding, not a batch of {ids.shape[1]}"
            )
        if not len(ids):
            raise ShapeMismatch(f"the tokens of the cache are not known: {history.why_unknown}")
        return identity, sequence, ids


def _name(identity: Identity, ids: Ids) -> str:
    text = hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
    return f"{RESERVED}{identity.fingerprint}/{text}"


def _equal(some: Ids, others: Ids) -> bool:
    return len(some) == len(others) == common_tokens(some, others)


def _count_hit(parent: Sequence) -> None:
    note = decode(parent.note)
    if note is not None:
        parent.note = note.used_again(time.time()).encode()
