"""spdk_kv: a KV cache for large language models that lives on an NVMe drive.

Start at :func:`spdk_kv.open`; README.md has an example.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("spdk_kv")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0+uninstalled"

if TYPE_CHECKING:
    from spdk_kv.errors import (
        CapacityError,
        ClosedError,
        CorruptionError,
        DeviceError,
        DeviceGone,
        DeviceTimeout,
        EngineUnavailable,
        KeyNotFound,
        NameInUse,
        ReadOnlyStore,
        ShapeMismatch,
        SpdkKvError,
        StoreLocked,
        StoreMismatch,
        WriteBudgetSpent,
    )
    from spdk_kv.sequence import Sequence
    from spdk_kv.store import EngineOptions, KVStore, PageCacheOptions, open
    from spdk_kv.types import KVShape, LayerShape

# Loaded on first use: `import spdk_kv` costs milliseconds, torch seconds.
_HOMES = {
    "EngineOptions": "store",
    "KVStore": "store",
    "PageCacheOptions": "store",
    "open": "store",
    "Sequence": "sequence",
    "KVShape": "types",
    "LayerShape": "types",
    "CapacityError": "errors",
    "ClosedError": "errors",
    "CorruptionError": "errors",
    "DeviceError": "errors",
    "DeviceGone": "errors",
    "DeviceTimeout": "errors",
    "EngineUnavailable": "errors",
    "KeyNotFound": "errors",
    "NameInUse": "errors",
    "ReadOnlyStore": "errors",
    "ShapeMismatch": "errors",
    "SpdkKvError": "errors",
    "StoreLocked": "errors",
    "StoreMismatch": "errors",
    "WriteBudgetSpent": "errors",
}

__all__ = [
    "CapacityError",
    "ClosedError",
    "CorruptionError",
    "DeviceError",
    "DeviceGone",
    "DeviceTimeout",
    "EngineOptions",
    "EngineUnavailable",
    "KVShape",
    "KVStore",
    "KeyNotFound",
    "LayerShape",
    "NameInUse",
    "PageCacheOptions",
    "ReadOnlyStore",
    "Sequence",
    "ShapeMismatch",
    "SpdkKvError",
    "StoreLocked",
    "StoreMismatch",
    "WriteBudgetSpent",
    "__version__",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spdk_kv' has no attribute {name!r}")
    value = getattr(import_module(f"spdk_kv.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
