"""What groups are selected by, stored beside the sequence of a cache with a name.

It is of one text, whose ids it carries: whatever a later text has in common with their beginning
is taken up, and the rest computed from the keys on the drive. So it need not be of the same moment
as the sequence's record, and where it is missing or damaged nothing is lost but a read.
"""

from __future__ import annotations

import json
import logging
import threading
import weakref
from typing import Any, Protocol

import numpy as np
import torch

from spdk_kv.deadline import Deadline
from spdk_kv.errors import ClosedError, CorruptionError, KeyNotFound, SpdkKvError
from spdk_kv.integrations.transformers import snapshot
from spdk_kv.integrations.transformers.history import History
from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.lifetime import outside_inference
from spdk_kv.integrations.transformers.sparse.stream import SparseStream
from spdk_kv.integrations.transformers.text import Ids, common_tokens
from spdk_kv.sparse import Selector
from spdk_kv.store import SELECTION, KVStore, companion_key

log = logging.getLogger(__name__)

# At a flush it is stored anew when there are so many tokens more, as a share: it is stored whole.
_GROWN = 8


class Owner(Protocol):
    """A SparseKVCache."""

    @property
    def sparse(self) -> SparseStream: ...
    @property
    def history(self) -> History | None: ...


class StoredSelection:
    """Puts and finds what the layers of one cache select by: when the store is flushed, and when
    the cache is closed. Thread-safe against the thread that flushes."""

    def __init__(self, store: KVStore, name: str, identity: Identity, cache: Owner) -> None:
        self._store = store
        self._key = companion_key(name, SELECTION)
        self._name = name
        self._cache = weakref.ref(cache)
        self._identity = identity
        self._saving = threading.RLock()
        self._saved: Ids | None = None
        self._may_last = identity.weights is not None and not store.read_only
        if self._may_last:
            store.before_flush.add(self.save)

    def find(self, ids: Ids) -> int:
        """Takes up what is stored of a beginning of ``ids``; of how many tokens. Blocks on the
        drive; what cannot be used is logged."""
        cache = self._cache()
        if cache is None:
            return 0
        try:
            whole = outside_inference(lambda: self._store.get(self._key))
            if snapshot.whose(whole) != self._whose(cache.sparse):
                return 0
            found = outside_inference(lambda: snapshot.decode(whole, lambda _: torch.device("cpu")))
            stored = found[0]["ids"].numpy().view("<u4")
            count = common_tokens(stored, ids)
            if count:
                cache.sparse.take_selectors(_selectors(cache.sparse, found[1:], count))
        except KeyNotFound:
            return 0
        except (CorruptionError, snapshot.Unreadable, KeyError, ValueError) as error:
            log.warning("what %r selects by is computed anew: %s", self._name, error)
            return 0
        self._saved = stored
        return count

    def end(self) -> None:
        """Before the cache is closed: puts it as it is. Blocks on the drive; what fails is
        logged."""
        self._store.before_flush.remove(self.save)
        self._put(None, least=1)

    def save(self, timeout_s: float | None = None) -> None:
        """Puts it if it has grown by a part. Blocks on the drive; what fails is logged."""
        self._put(timeout_s, least=0)

    def _put(self, timeout_s: float | None, least: int) -> None:
        deadline = Deadline(timeout_s)
        try:
            with deadline.hold(self._saving, "what groups are selected by"):
                taken = outside_inference(lambda: self._taken(least))
                if taken is not None:
                    ids, whole = taken
                    self._store.put(self._key, whole, timeout_s=deadline.left_s())
                    self._saved = ids
        except ClosedError:
            return
        except (SpdkKvError, snapshot.NotStorable) as error:
            log.warning("what %r selects by is not stored: %s", self._name, error)

    def _taken(self, least: int) -> tuple[Ids, torch.Tensor] | None:
        """The ids and the snapshot; None where there is nothing new, or a pass is under way."""
        moment = self._moment()
        if moment is None:
            return None
        cache, ids = moment[0], moment[3]
        layers = cache.sparse.selectors()
        count = min([len(ids), *(each.tokens for each in layers.values())], default=0)
        ids = ids[:count]
        if not layers or not self._is_new(ids, least):
            return None
        described: list[dict[str, Any]] = [{"ids": torch.from_numpy(ids.view("<i4").copy())}]
        for number, selector in layers.items():
            state = selector.copy(count).state()
            described.append(
                {"layer": number, **{name: _tensor(each) for name, each in state.items()}}
            )
        whole = snapshot.encode(self._whose(cache.sparse), described)
        after = self._moment()
        return (ids, whole) if after is not None and after[1:3] == moment[1:3] else None

    def _is_new(self, ids: Ids, least: int) -> bool:
        saved = self._saved
        if saved is None or common_tokens(saved, ids) < min(len(saved), len(ids)):
            return len(ids) > 0
        more = len(ids) - len(saved)
        return more >= least if least else more * _GROWN > len(saved)

    def _moment(self) -> tuple[Owner, int, int, Ids] | None:
        """What is another one after anything that may have changed a key; None amid it."""
        cache = self._cache()
        history = None if cache is None else cache.history
        if cache is None or history is None or not (self._may_last and history.settled):
            return None
        return cache, history.passes, history.epoch, history.text.ids

    def _whose(self, stream: SparseStream) -> str:
        """Of which model it is, and how it was made."""
        settings = stream.settings
        how = settings.keys, settings.rank, sorted(stream.scalings)
        return json.dumps([self._identity.fingerprint, *how])


def _selectors(
    stream: SparseStream, layers: list[dict[str, Any]], count: int
) -> dict[int, Selector]:
    """Those of the first ``count`` tokens. ValueError and KeyError where one does not fit."""
    made = {}
    for each in layers:
        number = int(each.pop("layer"))
        state = {name: tensor.numpy() for name, tensor in each.items()}
        selector = Selector.from_state(stream.settings, state, scale=stream.scalings[number])
        selector.truncate(count)
        made[number] = selector
    return made


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
