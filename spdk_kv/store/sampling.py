"""What a store counts, taken at one moment: :meth:`KVStore.sample`."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from spdk_kv.engines import Engine
from spdk_kv.metrics import OPERATIONS, Operation, Path, Publisher, Sample
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StoreLock

# Sequences whose traffic is told: as many as fit on a large screen.
_MOST_SEQUENCES = 32
# Of `residency` in the stats of a store. One with a single path decides nothing.
_DECIDED = ("budget_nbytes", "available_nbytes", "decisions", "promotions", "demotions")
_READ = ("cached_read_nbytes", "filled_nbytes", "missed_nbytes", "taken_over_nbytes")
# Of the store as a whole.
_WHOLE = (
    *("hits", "misses", "evictions", "corruptions", "blobs", "sequences"),
    *("capacity_nbytes", "used_nbytes", "largest_free_nbytes", "discarded_nbytes"),
    "failed_background_flushes",
)


class Counting(Protocol):
    """An open store."""

    engine: Engine
    paths: Orchestrator

    @property
    def location(self) -> str: ...
    @property
    def opened_s(self) -> float: ...
    def stats(self) -> dict[str, Any]: ...
    def sample(self) -> Sample: ...


def sample_of(store: Counting) -> Sample:
    """As :meth:`KVStore.sample`."""
    stats = store.stats()
    residency = stats["residency"]
    held = {name: stats[name] for name in _WHOLE}
    held["staging_leased_nbytes"] = stats["staging"]["leased_nbytes"]
    held["staging_free_nbytes"] = stats["staging"]["free_nbytes"]
    held |= {name: residency[name] for name in _READ}
    if residency["paths"] > 1:
        held |= {name: residency[name] for name in _DECIDED}
    if budget := stats["write_budget"]:
        held |= {
            "write_budget_nbytes": budget["budget_nbytes"],
            "write_budget_period_s": budget["period_s"],
            "write_budget_left_nbytes": budget["left_nbytes"],
            "declined_writes": budget["declined"],
        }
    paths = {}
    for engine in store.paths.routes.engines:
        is_second = engine is not store.engine
        units, nbytes = residency["cached_units"], residency["cached_nbytes"]
        if not is_second:
            units, nbytes = residency["units"] - units, residency["units_nbytes"] - nbytes
        name = "page_cache" if is_second else _path_name(engine)
        paths[name] = _path(engine, engine.stats(), units, nbytes)
    return Sample(
        store=store.location,
        time_s=time.time(),
        clock_s=time.monotonic(),
        opened_s=store.opened_s,
        cpu_ns=time.process_time_ns(),
        held=held,
        paths=paths,
        sequences=tuple(store.paths.traffic(_MOST_SEQUENCES)),
    )


def publisher_of(store: Counting, lock: StoreLock | None) -> Publisher:
    """Tells other processes what ``store`` counts, without keeping it alive, in a file beside its
    ``lock``. None (``ram://``, ``null://``, a reader): nobody is told."""
    reference = weakref.ref(store)

    def take() -> Sample | None:
        alive = reference()
        return None if alive is None else alive.sample()

    return Publisher(None if lock is None else os.path.dirname(lock.path), take)


def _path_name(engine: Engine) -> str:
    if engine.direct:
        return "direct"
    return "page_cache" if engine.persistent else "memory"


def _path(engine: Engine, counters: Mapping[str, Any], units: int, units_nbytes: int) -> Path:
    return Path(
        engine=engine.name,
        depth=engine.depth,
        deepest=counters["deepest"],
        depth_reached=counters["depth_achieved"],
        busy_ns=counters["busy_ns"],
        cpu_ns=counters["cpu_ns"],
        bounced_nbytes=counters["bounced_nbytes"],
        units=units,
        units_nbytes=units_nbytes,
        ops={name: Operation(**counters["ops"][name]) for name in OPERATIONS},
    )
