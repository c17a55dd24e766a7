"""Engines: the code that moves bytes. One contract (`base.Engine`), one suite of tests.

`location.py` reads a URI, `choice.py` opens the engine that serves it best on this machine.
"""

from __future__ import annotations

from spdk_kv.engines.base import Engine, EngineOptions, Link
from spdk_kv.engines.choice import EngineStatus, engine_status, open_engine
from spdk_kv.engines.files import FileEngine
from spdk_kv.engines.location import Location, parse_location
from spdk_kv.engines.pagecache import BesidePageCacheEngine, PageCacheEngine
from spdk_kv.engines.pagecache_apart import ApartPageCacheEngine, check_folder
from spdk_kv.engines.spdk.engine import SpdkEngine

__all__ = [
    "ApartPageCacheEngine",
    "BesidePageCacheEngine",
    "Engine",
    "EngineOptions",
    "EngineStatus",
    "FileEngine",
    "Link",
    "Location",
    "PageCacheEngine",
    "SpdkEngine",
    "check_folder",
    "engine_status",
    "open_engine",
    "parse_location",
]
