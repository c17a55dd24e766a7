"""Our classes take every call that LMCache makes, as recorded at the pinned version; where LMCache
is installed, the record is what it says today."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from integrations.signatures import Recorded, accepts, load, record, save
from spdk_kv.integrations.lmcache import Client

HERE = Path(__file__).parent
SIGNATURES = HERE / "signatures.json"
# A client is no class of LMCache's; its own one, in C++, is what the adapter was written for.
NATIVE = "LMCacheFSClient"
ADAPTER = "NativeConnectorL2Adapter"
BASE = "L2AdapterInterface"
OURS = ("get_usage", "report_status", "list_l2_keys", "close", "delete")
DRIVEN = (
    *("__init__", "submit_store_task", "pop_completed_store_tasks", "submit_load_task"),
    *("query_load_result", "submit_lookup_and_lock_task", "query_lookup_and_lock_result"),
    *("submit_unlock", "delete", "get_usage", "report_status", "close"),
)


def real() -> dict[str, Recorded]:
    """What the installed LMCache says."""
    from lmcache.lmcache_fs import LMCacheFSClient
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
    from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import (
        NativeConnectorL2Adapter,
    )

    names = [name for name in dir(LMCacheFSClient) if not name.startswith("_")]
    return {
        NATIVE: {name: native(getattr(LMCacheFSClient, name)) for name in sorted(names)},
        ADAPTER: record(NativeConnectorL2Adapter, DRIVEN),
        BASE: record(L2AdapterInterface, OURS),
    }


def native(method) -> list[dict]:
    """The parameters that pybind11 wrote into a method's docstring."""
    given = re.search(r"\((.*)\) -> ", inspect.getdoc(method) or "")
    assert given, f"{method} has no signature"
    names = re.findall(r"(\w+): ", given[1])
    return [{"name": name, "kind": "POSITIONAL_OR_KEYWORD", "default": False} for name in names[1:]]


def test_the_client_takes_every_call_of_the_adapter():
    assert accepts(Client, load(SIGNATURES)[NATIVE]) == []


def test_the_record_is_what_lmcache_says():
    pytest.importorskip("lmcache", reason="LMCache is not installed: scripts/test.sh --hosts")
    pinned = re.search(r"lmcache==(\S+)", (HERE / "requirements.txt").read_text())
    assert pinned
    assert version("lmcache") == pinned[1]
    assert real() == load(SIGNATURES)


if __name__ == "__main__":
    save(SIGNATURES, real())
