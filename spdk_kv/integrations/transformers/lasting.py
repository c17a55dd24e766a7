"""The states of a cache with a name, stored beside its sequence.

A state belongs to one text and cannot go back, so a snapshot says whose it is: of which model, and
of which tokens, all of them. It is used for those and nothing else, whenever it was put and
whatever happened to the sequence since. It goes into the slot that the one before did not take.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from spdk_kv.deadline import Deadline
from spdk_kv.errors import ClosedError, CorruptionError, KeyNotFound, SpdkKvError
from spdk_kv.integrations.transformers import snapshot
from spdk_kv.integrations.transformers.history import History
from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.lifetime import outside_inference
from spdk_kv.integrations.transformers.states import LayerStates
from spdk_kv.integrations.transformers.stream import LayerStream
from spdk_kv.integrations.transformers.text import Ids
from spdk_kv.store import SLOTS, KVStore, companion_key

log = logging.getLogger(__name__)


class Owner(Protocol):
    """An OffloadedKVCache."""

    @property
    def parts(self) -> tuple[LayerStream, LayerStates]: ...
    @property
    def history(self) -> History | None: ...


@dataclass(frozen=True)
class Found:
    """The states after the tokens ``ids``, ``[tokens, rows]``: for each layer, its attributes."""

    ids: Ids
    layers: list[dict[str, Any]]


class LastingStates:
    """Puts and finds the snapshots of one cache. They are put when the store is flushed and when
    the cache is closed, if the states are at the last known token then.

    Thread-safe against the thread that flushes: what a forward pass, or a change, may have touched
    meanwhile is not put, and the one before stays.
    """

    def __init__(
        self, store: KVStore, name: str, identity: Identity, cache: Owner, model: object
    ) -> None:
        self._store = store
        self._name = name
        self._identity = identity
        self._cache = weakref.ref(cache)
        self._devices: set[torch.device] = set()
        if isinstance(model, nn.Module):
            self._devices = {parameter.device for parameter in model.parameters()}
        # One snapshot at a time, or two of the same text would take both slots. Nobody else waits
        # for it.
        self._saving = threading.RLock()
        self._latest = ""
        self._slot = 0
        self._may_last = identity.weights is not None and not store.read_only
        if self._may_last:
            store.before_flush.add(self.save)

    # -- finding --------------------------------------------------------------------------------

    def find(self, ids: Ids) -> Found | None:
        """The snapshot of the most tokens that ``ids`` begins with and all layers of the sequence
        have; None where there is none, which is logged. Blocks on the drive."""
        sequence = outside_inference(lambda: self._store.sequence(self._name))
        held = min(sequence.tokens(layer) for layer in range(sequence.shape.layers))
        count = min(len(ids), held)
        best: tuple[int, int, torch.Tensor] | None = None
        for slot in range(SLOTS):
            with suppress(KeyNotFound, CorruptionError, snapshot.Unreadable, ValueError):
                whole = outside_inference(partial(self._get, slot))
                whose = snapshot.whose(whole)
                n = int(whose.partition(" ")[0])
                fits = 0 < n <= count and whose == self._whose(ids[:n])
                if fits and (best is None or n > best[0]):
                    best = n, slot, whole
        if best is None:
            log.warning(
                "%r begins anew: no states are stored that belong to a beginning of the text; they "
                "are those of the end of an earlier one",
                self._name,
            )
            return None
        n, slot, whole = best
        try:
            layers = outside_inference(lambda: snapshot.decode(whole, self._place_of))
        except snapshot.Unreadable as error:
            log.warning("%r begins anew: its states cannot be taken up here: %s", self._name, error)
            return None
        self._slot, self._latest = (slot + 1) % SLOTS, self._whose(ids[:n])
        return Found(ids[:n], layers)

    def _get(self, slot: int) -> torch.Tensor:
        whole: torch.Tensor = self._store.get(companion_key(self._name, slot))
        return whole

    def _place_of(self, device: torch.device) -> torch.device:
        """Where states are that were on ``device``, which this machine need not have."""
        if len(self._devices) == 1:
            return next(iter(self._devices))
        if device not in self._devices:
            raise snapshot.Unreadable(f"they were on {device}, where nothing of the model is")
        return device

    # -- putting --------------------------------------------------------------------------------

    def end(self) -> None:
        """Before the cache is closed: puts the states, and has their tokens recorded. Blocks on
        the drive; what fails is logged."""
        self._store.before_flush.remove(self.save)
        cache = self._cache()
        sequence = None if cache is None else cache.parts[0].sequence
        if not self.save() or sequence is None:
            return
        try:
            # The slot of the last record's states is overwritten next.
            sequence.stage_for_commit()
        except SpdkKvError as error:
            log.debug("%r is not recorded: %s", self._name, error)

    def save(self, timeout_s: float | None = None) -> bool:
        """Puts the states as they are now. Returns whether they are stored; where they are not,
        those before are still. Blocks on the drive."""
        deadline = Deadline(timeout_s)
        try:
            with deadline.hold(self._saving, "a snapshot of the states"):
                return self._save(deadline)
        except ClosedError:
            return False
        except (SpdkKvError, snapshot.NotStorable) as error:
            log.warning("the states of %r are not stored: %s", self._name, error)
            return False

    def _save(self, deadline: Deadline) -> bool:
        taken = outside_inference(self._taken)
        if taken is None:
            return False
        whose, whole = taken
        if whole is not None:
            key = companion_key(self._name, self._slot)
            self._store.put(key, whole, timeout_s=deadline.left_s())
            self._latest, self._slot = whose, (self._slot + 1) % SLOTS
        return True

    def _taken(self) -> tuple[str, torch.Tensor | None] | None:
        """Whose the states are, and their snapshot (None if that is stored already); None if they
        are not, or not known to be, at the same token all the time."""
        moment = self._moment()
        if moment is None:
            return None
        _, _, states, whose = moment
        if whose == self._latest:
            return whose, None
        layers = states.attributes
        _wait_for_gpus(layers)
        whole = snapshot.encode(whose, layers)
        return (whose, whole) if self._moment() == moment else None

    def _moment(self) -> tuple[int, int, LayerStates, str] | None:
        """What is another one after anything that may have changed a state; None amid it."""
        cache = self._cache()
        history = None if cache is None else cache.history
        if cache is None or history is None or not (self._may_last and history.settled):
            return None
        passes, epoch = history.passes, history.epoch
        stream, states = cache.parts
        sequence, ids = stream.sequence, history.text.ids
        if sequence is None or not states.is_whole or not len(ids):
            return None
        if any(sequence.tokens(layer) != len(ids) for layer in range(sequence.shape.layers)):
            return None
        return passes, epoch, states, self._whose(ids)

    def _whose(self, ids: Ids) -> str:
        """The number of tokens, and a digest of them and of the model."""
        digest = hashlib.blake2b(digest_size=32)
        for part in (self._identity.fingerprint, self._identity.release, ids.shape):
            digest.update(f"{part}\n".encode())
        digest.update(ids.tobytes())
        return f"{len(ids)} {digest.hexdigest()}"


def _wait_for_gpus(layers: Iterable[dict[str, Any]]) -> None:
    """What other streams have begun to compute comes to its end."""
    devices = {
        tensor.device
        for layer in layers
        for value in layer.values()
        for tensor in (list(value.values()) if isinstance(value, dict) else [value])
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"
    }
    for device in devices:
        torch.cuda.synchronize(device)
