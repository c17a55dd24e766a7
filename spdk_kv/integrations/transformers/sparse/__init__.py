"""Reads a part of K/V: what matters to the token that is computed."""

from __future__ import annotations

from spdk_kv.integrations.transformers.sparse.cache import SparseKVCache

__all__ = ["SparseKVCache"]
