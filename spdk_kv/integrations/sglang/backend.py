"""What SGLang calls, from its prefetch and backup threads: pages to a store, and back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.pages import get_pages, put_pages, said
from spdk_kv.integrations.sglang.hits import Wanted, leading, restorable
from spdk_kv.integrations.sglang.identity import Keys, model_facts, prefix, shard_facts
from spdk_kv.integrations.sglang.moving import get_pieces, put_pieces
from spdk_kv.integrations.sglang.options import StorageConfig, read_options
from spdk_kv.integrations.sglang.pools import Pool, bytes_of
from spdk_kv.integrations.sglang.stores import Stores
from spdk_kv.store import KVStore

log = logging.getLogger(__name__)

_GB = 1e9
# SGLang's name of the pool that the KV pages themselves are in, and of those whose pages differ
# between tensor-parallel ranks also where the KV pages don't.
_KV, _MAMBA = "kv", "mamba"


class Backend:
    """SGLang's storage tier on a store of spdk_kv: ``HiCacheSpdkKv``, by the configuration
    ``--hicache-storage-backend dynamic``.

    Every call blocks until the drive is done, which is why SGLang makes them from threads of its
    own. None raises for a miss or for what a drive does: the answer is False (or None, or 0), and
    the log says why. Pages are told apart by model, dtype, layout and rank; a page is stored whole
    or not at all, and one that is damaged is a miss.
    """

    def __init__(self, storage_config: StorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        """Opens the store.

        Args:
            storage_config: SGLang's; ``extra_config`` holds what the user set.
            kwargs: What SGLang passes to any dynamic backend. Nothing, today.

        Raises:
            ValueError: An option is unknown, or makes no sense.
            StoreLocked: Another engine has the store open. With ``read_only`` it may.
            SpdkKvError: As :func:`spdk_kv.open`.
        """
        options = read_options(storage_config.extra_config)
        self._config = storage_config
        self._read_only = options.read_only
        self._is_v1 = bool((storage_config.extra_config or {}).get("interface_v1"))
        self._model = model_facts(storage_config, options.identity)
        self._is_replicated = storage_config.is_mla_model
        self.registered_pools: dict[str, Any] = {}
        self._pools: dict[str, Pool] = {}
        # Whole tensors, as they come from `get_data_page`: another order of bytes than by pieces.
        self._flat: dict[str, Keys] = {}
        self._unregistered = Keys(self._model, self._shard(_KV, None), {"pool": "none"})
        self._lock = threading.Lock()
        self._moved: dict[str, list[tuple[int, float]]] = {"prefetch": [], "backup": []}
        self._stores: Stores = Stores(options, storage_config)

    # -- host memory ----------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of the KV pages, which v1 calls are about."""
        self.mem_pool_host = mem_pool_host
        self._register(mem_pool_host, _KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """One pool of a hybrid model."""
        name = _name(host_pool_name)
        self.registered_pools[name] = host_pool
        self._register(host_pool, name)

    def on_host_pools_registered(self) -> None:
        """All pools of the start are known. Raises where a store that they need does not open."""
        if any(not self._is_shared(name) for name in self._pools):
            self._stores.own()

    def _register(self, host: Any, name: str) -> None:
        if name in self._pools and self._pools[name].host is host:
            return
        shard = self._shard(name, host)
        pool = Pool(host, self._model, shard, name)
        self._pools[name] = pool
        whole = {"pool": name, "form": "flat", "like": pool.keys("")}
        self._flat[name] = Keys(self._model, shard, whole)
        log.info(
            "pool %s (%s): pages of %d bytes in %d pieces, keys %s...",
            name,
            type(host).__name__,
            pool.page_nbytes,
            pool.pieces,
            pool.keys.prefix,
        )

    def _is_shared(self, name: str, host: Any = None) -> bool:
        """Whether all tensor-parallel ranks have the same bytes in the pages of a pool."""
        if host is None and (pool := self._pools.get(name)) is not None:  # closed meanwhile: none
            host = pool.host
        # A pool with heads is split by them, as that of a draft model beside one with MLA.
        return self._is_replicated and name != _MAMBA and not hasattr(host, "head_num")

    def _shard(self, name: str, host: Any) -> dict[str, Any]:
        return shard_facts(self._config, shared=self._is_shared(name, host))

    def _store(self, name: str) -> KVStore | None:
        """Where the pages of a pool are; None while that cannot be read."""
        return self._stores.shared() if self._is_shared(name) else self._stores.own()

    def _may_write(self, name: str) -> bool:
        return not self._read_only and (not self._is_shared(name) or self._stores.writes_shared)

    # -- pages, where they lie (v1) ---------------------------------------------------------------

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Reads the pages of ``keys`` to the host's memory at ``host_indices`` (a CPU tensor, a
        slot a token). For each whether it is there; False leaves its memory undefined."""
        return self._move(_KV, keys, host_indices, "prefetch")

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Stores the pages at ``host_indices`` under ``keys``. For each whether it is stored."""
        return self._move(_KV, keys, host_indices, "backup")

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of ``keys``, from the first on, are stored. Does not block."""
        # Of a pool without bytes nothing is stored; those that hold them are asked for in v2.
        return 0 if self._is_logical(_KV) else leading(self._stored(_KV, keys))

    def _is_logical(self, name: str) -> bool:
        pool = self._pools.get(name)
        return pool is not None and pool.logical

    def _stored(self, name: str, keys: Sequence[str]) -> list[bool]:
        return self._has(name, [self._key(name, key) for key in keys])

    def _has(self, name: str, keys: Sequence[str]) -> list[bool]:
        try:
            store = self._store(name)
            if store is not None:
                return [nbytes is not None for nbytes in store.sizes(keys)]
        except SpdkKvError as failure:
            log.warning("%d pages count as missing: %s", len(keys), failure)
        return [False] * len(keys)

    def _key(self, name: str, key: str) -> str:
        """The key of a page of pool ``name``, in the form in which SGLang moves it."""
        pool = self._pools.get(name)
        if pool is not None and self._by_pieces(pool):
            return pool.keys(key)
        return self._flat_key(key, name)

    def _flat_key(self, key: str, name: str = _KV) -> str:
        """The key of a page that is moved as one tensor."""
        return self._flat.get(name, self._unregistered)(key)

    def _by_pieces(self, pool: Pool) -> bool:
        return bool(pool.pieces) and (self._is_v1 or pool.name != _KV)

    def _move(self, name: str, keys: Sequence[str], indices: Any, kind: str) -> list[bool]:
        """Reads or stores pages of one pool."""
        is_put = kind == "backup"
        pool = self._pools.get(name)
        if pool is None:
            log.error("no host pool %s is registered: %d pages are not moved", name, len(keys))
            return [False] * len(keys)
        if pool.logical:
            return [True] * len(keys)
        if is_put and not self._may_write(name):
            # Another rank writes the same bytes; a reader writes none.
            return [not self._read_only] * len(keys)
        if not keys:
            return []
        try:
            with self._stores.use(shared=self._is_shared(name)) as store:
                if store is None:
                    return [False] * len(keys)
                begun = time.perf_counter()
                move = self._pieces if self._by_pieces(pool) else self._whole
                ok = move(store, pool, keys, indices, is_put)
                self._count(kind, pool, sum(ok), time.perf_counter() - begun)
                return ok
        except Exception as failure:  # whatever it is, it is a miss: SGLang computes the pages
            what = said(failure, fully=True)
            log.error("%s of %d pages of pool %s: %s", kind, len(keys), name, what)
            return [False] * len(keys)

    def _pieces(
        self, store: KVStore, pool: Pool, keys: Sequence[str], indices: Any, is_put: bool
    ) -> list[bool]:
        found = pool.pages(indices, len(keys))
        pages = [(pool.keys(key), pieces) for key, pieces in zip(keys, found, strict=True)]
        return put_pieces(store, pages) if is_put else get_pieces(store, pages)

    def _whole(
        self, store: KVStore, pool: Pool, keys: Sequence[str], indices: Any, is_put: bool
    ) -> list[bool]:
        """As :meth:`_pieces`, for a pool that gives no addresses: it copies its pages itself."""
        starts = pool.starts(indices, len(keys))
        names = [self._flat_key(key, pool.name) for key in keys]
        if is_put:
            tensors = [pool.host.get_data_page(start, flat=True) for start in starts]
            pages = [(key, bytes_of(tensor)) for key, tensor in zip(names, tensors, strict=True)]
            return put_pages(store, pages, again=False)
        tensors = [pool.host.get_dummy_flat_data_page() for _ in starts]
        pages = [(key, bytes_of(tensor)) for key, tensor in zip(names, tensors, strict=True)]
        sound = get_pages(store, pages)
        for start, tensor, there in zip(starts, tensors, sound, strict=True):
            if there:
                pool.host.set_from_flat_data_page(start, tensor)
        return sound

    # -- pages of several pools (v2) --------------------------------------------------------------

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """How many pages of a prompt can be restored, which all of its pools have to have.

        Does not block. Returns SGLang's PoolTransferResult, with every number of pages at which
        that is so.
        """
        from sglang.srt.mem_cache.hicache_storage import PoolTransferResult

        is_logical = self._is_logical(_KV)
        kv_pages = len(keys) if is_logical else leading(self._stored(_KV, keys))
        wanted = []
        for transfer in (pool_transfers or ()) if kv_pages else ():
            policy = _name(transfer.hit_policy)
            if policy == "trailing_pages":
                trailing = max(1, len(transfer.keys or ()))
            elif policy == "all_pages":
                trailing = None
            else:
                # It gates nothing, and no verdict on it is one that SGLang understands.
                log.debug("pool %s has the hit policy %s", transfer.name, policy)
                continue
            stored = self._stored(_name(transfer.name), keys[:kv_pages])
            wanted.append(Wanted(_name(transfer.name), stored, trailing))
        if is_logical and not wanted:
            kv_pages = 0
        possible, own = restorable(kv_pages, wanted)
        names = {_name(transfer.name): transfer.name for transfer in pool_transfers or ()}
        counts = {names[name]: pages for name, pages in own.items()}
        if kv_pages:
            counts[_pool_name(_KV)] = kv_pages
        return PoolTransferResult(possible[-1] if possible else 0, counts, possible)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """As :meth:`batch_get_v1`, for pages of several pools. By pool."""
        return {each.name: self._transfer(each, "prefetch") for each in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """As :meth:`batch_set_v1`, for pages of several pools. By pool."""
        return {each.name: self._transfer(each, "backup") for each in transfers}

    def _transfer(self, transfer: Any, kind: str) -> list[bool]:
        keys = transfer.keys or []
        if transfer.host_indices is None:
            log.error("pool %s: no host indices for %d pages", transfer.name, len(keys))
            return [False] * len(keys)
        return self._move(_name(transfer.name), keys, transfer.host_indices, kind)

    # -- pages as tensors -------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The page under ``key``, in ``target_location`` (a CPU tensor as large, whose contents are
        undefined otherwise), or in a new tensor of bytes. None where there is none."""
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        """As :meth:`get`, for several pages."""
        nothing: list[Any] = [None] * len(keys)
        try:
            with self._stores.use(shared=self._is_shared(_KV)) as store:
                return (
                    nothing if store is None else self._get_tensors(store, keys, target_locations)
                )
        except Exception as failure:
            log.error("reading %d pages: %s", len(keys), said(failure, fully=True))
            return nothing

    def _get_tensors(self, store: KVStore, keys: list[str], target_locations: Any) -> list[Any]:
        import torch

        names = [self._flat_key(key) for key in keys]
        places = list(target_locations or [None] * len(keys))
        for at, nbytes in enumerate(store.sizes(names)):
            if places[at] is None and nbytes is not None:
                places[at] = torch.empty(nbytes, dtype=torch.uint8)
        begun = time.perf_counter()
        # One that is not contiguous is filled by a copy.
        buffers = [torch.empty(0) if place is None else place.contiguous() for place in places]
        pages = list(zip(names, map(bytes_of, buffers), strict=True))
        sound = get_pages(store, pages)
        self._count("prefetch", self._pools.get(_KV), sum(sound), time.perf_counter() - begun)
        for place, buffer, there in zip(places, buffers, sound, strict=True):
            if there and place is not None and place.data_ptr() != buffer.data_ptr():
                place.copy_(buffer)
        return [place if there else None for place, there in zip(places, sound, strict=True)]

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Stores a page, a tensor given as ``value`` or as ``target_location``. Whether it is
        stored."""
        return self.batch_set([key], [target_location if value is None else value])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """As :meth:`set`, for several pages: whether all are stored."""
        values = target_locations if values is None else values
        try:
            if not self._may_write(_KV):
                return not self._read_only
            with self._stores.use(shared=self._is_shared(_KV)) as store:
                if store is None or values is None:
                    return False
                begun = time.perf_counter()
                pages = [
                    (self._flat_key(key), bytes_of(value))
                    for key, value in zip(keys, values, strict=True)
                ]
                ok = put_pages(store, pages, again=False)
                self._count("backup", self._pools.get(_KV), sum(ok), time.perf_counter() - begun)
                return all(ok)
        except Exception as failure:
            log.error("storing %d pages: %s", len(keys), said(failure, fully=True))
            return False

    def exists(self, key: str) -> bool:
        """Whether :meth:`get` would find ``key``. Does not block."""
        return self._has(_KV, [self._flat_key(key)])[0]

    # -- the whole ------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Forgets all pages of this model, and no others, in this rank's store. Does not block on
        the drive. Whether that was possible."""
        try:
            for store in self._stores.opened():
                if store.read_only:
                    continue
                for key in store.keys(prefix(self._model)):
                    store.delete(key)
            return not self._read_only
        except SpdkKvError as failure:
            log.warning("not everything is forgotten: %s", failure)
            return False

    def get_stats(self) -> Any:
        """SGLang's StorageMetrics of what was moved since the last call: pages, and GB/s. None
        where it was started without storage metrics. Does not block."""
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            moved, self._moved = self._moved, {"prefetch": [], "backup": []}
        metrics = StorageMetrics()
        metrics.prefetch_pgs.extend(pages for pages, _ in moved["prefetch"])
        metrics.prefetch_bandwidth.extend(speed for _, speed in moved["prefetch"])
        metrics.backup_pgs.extend(pages for pages, _ in moved["backup"])
        metrics.backup_bandwidth.extend(speed for _, speed in moved["backup"])
        return metrics

    def _count(self, kind: str, pool: Pool | None, pages: int, seconds: float) -> None:
        if not (self._config.enable_storage_metrics and pages):
            return
        nbytes = 0 if pool is None else pages * pool.page_nbytes
        with self._lock:
            self._moved[kind].append((pages, nbytes / _GB / max(seconds, 1e-9)))

    def close(self) -> None:
        """Flushes and closes the store; blocks until what is under way has ended. Calls afterwards
        find nothing. May be called twice."""
        self._stores.close()
        self._pools.clear()
        self._flat.clear()
        self.registered_pools.clear()
        self.mem_pool_host = None


def _name(name: Any) -> str:
    """The text of SGLang's enumerations, or of a plain name."""
    return str(getattr(name, "value", name))


def _pool_name(name: str) -> Any:
    from sglang.srt.mem_cache.hicache_storage import PoolName

    return PoolName(name)
