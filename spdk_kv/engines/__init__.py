"""Engines: the code that moves bytes. One contract (`base.Engine`), one suite of tests.

`location.py` reads a URI, `choice.py` opens the engine that serves it best on this machine.
"""

from __future__ import annotations

from spdk_kv.engines.base import Engine, Link, QueueOptions
from spdk_kv.engines.choice import EngineStatus, engine_status, open_engine
from spdk_kv.engines.files import FileEngine
from spdk_kv.engines.futures import Callbacks
from spdk_kv.engines.location import Location, parse_location
from spdk_kv.engines.pagecache.copies import CopyPageCacheEngine, check_page_cache_dir
from spdk_kv.engines.pagecache.engine import PageCacheEngine
from spdk_kv.engines.pagecache.shared import SharedPageCacheEngine
from spdk_kv.engines.spdk.engine import SpdkEngine
from spdk_kv.engines.uring import OLDEST_KERNEL as URING_OLDEST_KERNEL

__all__ = [
    "URING_OLDEST_KERNEL",
    "Callbacks",
    "CopyPageCacheEngine",
    "Engine",
    "EngineStatus",
    "FileEngine",
    "Link",
    "Location",
    "PageCacheEngine",
    "QueueOptions",
    "SharedPageCacheEngine",
    "SpdkEngine",
    "check_page_cache_dir",
    "engine_status",
    "open_engine",
    "parse_location",
]
