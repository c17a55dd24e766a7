"""LMCache's adapter `plugin`: as the client by `native_plugin`, and LMCache is told what the store
holds, over restarts as well.

Imports LMCache, of which it is a class.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

from lmcache.v1.distributed.api import EncodedObjectKey, KeyEntry, KeyListPage
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage
from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import NativeConnectorL2Adapter

from spdk_kv.errors import ClosedError
from spdk_kv.integrations.lmcache.client import Client

# Between the parts of a key that has no salt.
_KEY_ATS = 3
_TOLD = ("location", "engine", "blobs", "hits", "misses", "evictions", "corruptions")


class Adapter(NativeConnectorL2Adapter):  # type: ignore[misc]  # untyped where it is not installed
    """A store as LMCache's second level; its configuration names this class.

    Usage and keys are the store's own, so they are right after a restart, and after the store has
    made room by itself. LMCache is not asked to evict: the store's ``capacity`` bounds it. Bytes by
    salt, for quotas, are LMCache's count, which begins at zero.
    """

    def __init__(self, config: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        """Opens the store; blocks until that is done.

        Args:
            config: The fields of :class:`Options`.
            l1_memory_desc: Where LMCache's memory is; not needed.

        Raises as :class:`Client`.
        """
        self.client = Client(**config)
        super().__init__(self.client, type_name="spdk_kv")

    def get_usage(self) -> AdapterUsage:
        """What the store takes, and may take; what was deleted counts until the next flush. Does
        not block."""
        counted = super().get_usage()
        try:
            stats = self.client.store.stats()
        except ClosedError:  # LMCache's own threads may ask while it is being shut down
            return counted
        return AdapterUsage(
            total_bytes_used=stats["used_nbytes"],
            total_capacity_bytes=stats["capacity_nbytes"],
            bytes_by_cache_salt=counted.bytes_by_cache_salt,
        )

    def report_status(self) -> dict[str, Any]:
        """For `/status`: how the store is, and what it counted since it was opened."""
        status: dict[str, Any] = super().report_status()
        try:
            stats = self.client.store.stats()
        except ClosedError:
            return status
        return {
            **status,
            **{name: stats[name] for name in _TOLD},
            "bytes_used": stats["used_nbytes"],
            "capacity_bytes": stats["capacity_nbytes"],
        }

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """The keys that are stored, in the order of their text. Takes longer the more there are.

        Args:
            model_name: Of this model alone.
            page_size: How many at most. ValueError unless there may be one.
            cursor: Where the page before ended.
        """
        if page_size < 1:
            raise ValueError(f"page_size is 1 or more, not {page_size}")
        store, prefix = self.client.store, self.client.prefix
        found = store.keys(prefix + ("" if model_name is None else f"{model_name}@"))
        # The store may be others' as well.
        keys = sorted(key for key in found if key.count("@") >= _KEY_ATS)
        begin = 0 if cursor is None else bisect.bisect_right(keys, cursor)
        page = keys[begin : begin + page_size]
        entries = [
            KeyEntry(key=_parsed(key[len(prefix) :]), size_bytes=nbytes)
            for key, nbytes in zip(page, store.sizes(page), strict=True)
            if nbytes is not None
        ]
        is_last = begin + page_size >= len(keys)
        return KeyListPage(entries=tuple(entries), next_page_token=None if is_last else page[-1])


def _parsed(text: str) -> EncodedObjectKey:
    """A key as `NativeConnectorL2Adapter` writes it, taken apart."""
    model, rank, group, chunk, *salt = text.split("@")
    return EncodedObjectKey(
        chunk_hash_hex=chunk,
        model_name=model,
        kv_rank=int(rank, 16),
        object_group_id=int(group, 16),
        cache_salt=salt[0] if salt else "",
    )
