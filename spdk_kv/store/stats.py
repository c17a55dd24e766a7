"""What a store tells of itself: :meth:`KVStore.stats`."""

from __future__ import annotations

from typing import Any, Protocol

from spdk_kv.engines import Engine
from spdk_kv.link import Links
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.store.catalog import Catalog
from spdk_kv.store.writes import Writes


class Told(Protocol):
    """An open store."""

    engine: Engine
    staging: StagingPool
    links: Links
    paths: Orchestrator
    catalog: Catalog
    failed_flushes: int
    writes: Writes

    @property
    def location(self) -> str: ...
    def sequences(self) -> list[str]: ...


def stats_of(store: Told) -> dict[str, Any]:
    """As :meth:`KVStore.stats`."""
    engine = store.engine.stats()
    histogram = engine.pop("histogram")
    del engine["ops"]  # KVStore.sample has it
    catalog = store.catalog
    with catalog.records.lock:
        held = catalog.records.stats()
        # Free, while it is given back.
        held["used_nbytes"] -= catalog.reserved.nbytes
        held["free_nbytes"] += catalog.reserved.nbytes
    return {
        "location": store.location,
        "engine": store.engine.name,
        **held,
        "discarded_nbytes": catalog.trimmer.given_nbytes,
        "sequences": len(store.sequences()),
        "failed_background_flushes": store.failed_flushes,
        "write_budget": store.writes.stats(),
        "staging": store.staging.stats(),
        "residency": store.paths.stats(),
        "pipelines": store.links.stats(),
        "transfers": engine,
        "latency_ns": histogram,
    }
