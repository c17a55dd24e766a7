"""What vLLM's `/metrics` shows of a tier, beside what vLLM itself counts for every tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_PREFIX = "vllm:kv_offload_spdk_kv_"
# Of KVStore.stats(), and "declined".
_GAUGES = {
    "used_bytes": ("used_nbytes", "Bytes of the store that are in use."),
    "capacity_bytes": ("capacity_nbytes", "Bytes that the store may hold."),
    "stored_chunks": ("blobs", "Chunks in the store, of all models."),
}
_COUNTERS = {
    "evicted_chunks": ("evictions", "Chunks that were forgotten to make room."),
    "damaged_chunks": ("corruptions", "Chunks that were not as they were stored: a miss each."),
    "declined_chunks": (
        "declined",
        "Chunks that were not stored, because too much waited for the drive already, or the store "
        "is open read only.",
    ),
}
LABELS = ("store",)


def definitions(gauge: Callable[..., Any], counter: Callable[..., Any]) -> dict[str, Any]:
    """The metrics by name, as vLLM's classes for gauges and counters."""
    found = {}
    for make, kind in ((gauge, _GAUGES), (counter, _COUNTERS)):
        for name, (_, text) in kind.items():
            found[_PREFIX + name] = make(documentation=text, labelnames=LABELS)
    return found


class Telling:
    """Observations of one tier; counters as differences since they were told last."""

    def __init__(self, location: str) -> None:
        self._label = (location,)
        self._told: dict[str, int] = {}

    def tell(self, held: Mapping[str, int], stats: Any) -> Any:
        """Fills vLLM's ``stats`` with what is in ``held`` and changed since; returns it, or None
        where nothing did."""
        for name, (source, _) in _GAUGES.items():
            if source in held and held[source] != self._told.get(source):
                stats.set_gauge(_PREFIX + name, held[source], self._label)
        for name, (source, _) in _COUNTERS.items():
            if grown := held.get(source, 0) - self._told.get(source, 0):
                stats.increase_counter(_PREFIX + name, grown, self._label)
        self._told.update(held)
        return None if stats.is_empty() else stats
