"""The two paths of a store: its engine, and a page cache of the same bytes or of copies."""

from __future__ import annotations

import os

from spdk_kv.engines import (
    CopyPageCacheEngine,
    Engine,
    FileEngine,
    SharedPageCacheEngine,
    check_page_cache_dir,
    parse_location,
)
from spdk_kv.errors import SpdkKvError
from spdk_kv.memory import MemoryReader
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.residency import make_policy
from spdk_kv.store.parts import Opened
from spdk_kv.store.settings import StoreSettings
from spdk_kv.store.why import WhyFile

# What the kernel's page cache reaches by itself.
_COHERENT = ("file", "block")


def check_settings(location: str | os.PathLike[str], settings: StoreSettings) -> None:
    """Refuses an unsuitable folder for copies before anything is begun at ``location``: ValueError
    where it has no use, EngineUnavailable where it cannot be used."""
    folder = settings.page_cache.folder_path
    if folder is None:
        return
    place = parse_location(location)
    if place.scheme in _COHERENT:
        raise ValueError(
            f"{place} needs no folder for the page cache, which reaches the same bytes. It is for "
            "drives that the kernel's page cache does not reach (spdk://, ng://)"
        )
    if place.scheme == "null":
        raise ValueError(f"{place} keeps no bytes, so there is nothing to copy to a folder")
    if not settings.verify:
        raise ValueError(
            "a folder for the page cache needs verify=True: only checksums show what the kernel "
            "failed to write there"
        )
    check_page_cache_dir(folder)


def open_paths(parts: Opened, staging: StagingPool, settings: StoreSettings) -> Orchestrator:
    """Opens the second path beside the engine of ``parts``. ValueError for an unknown policy; where
    there can be one path only the orchestrator says why."""
    engine = parts.engine
    policy = make_policy(settings.page_cache.policy)
    memory = MemoryReader(settings.page_cache.memory_nbytes)
    cache, single = _open_cache(engine, settings)
    # Half of what is kept for transfers, so that a read on demand still finds room there.
    ahead_nbytes = settings.engine.staging_nbytes // 2
    paths = Orchestrator(engine, cache, policy, memory, single, staging, ahead_nbytes)
    if parts.lock is not None:
        paths.watch(WhyFile(os.path.dirname(parts.lock.path), paths.summary))
    return paths


def _open_cache(
    engine: Engine, settings: StoreSettings
) -> tuple[SharedPageCacheEngine | None, str]:
    """The page cache's engine, or None and why there is none."""
    if settings.page_cache.policy == "direct":
        return None, "residency is 'direct': the page cache is not used"
    folder = settings.page_cache.folder_path
    if folder is not None:
        return CopyPageCacheEngine(folder, engine.capacity_nbytes or 0, engine.options), ""
    if not isinstance(engine, FileEngine):
        why = f"the engine {engine.name} has no page cache beside it"
        remedy = "; PageCacheOptions(folder=...) gives it one" if engine.persistent else ""
        return None, why + remedy
    if not engine.direct:
        chosen = settings.engine.name is not None
        why = "was asked for" if chosen else "is the only way to this file or drive here"
        return None, f"the engine {engine.name} {why}: everything goes through the page cache"
    try:
        return SharedPageCacheEngine(engine.where, engine.options, engine.read_only), ""
    except SpdkKvError as refused:
        return None, f"the page cache cannot be used beside {engine.name}: {refused}"
