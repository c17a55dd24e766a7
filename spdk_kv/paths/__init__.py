"""Two paths behind one door: each layer is read directly or through the page cache.

`orchestrator.py` routes reads and moves layers by what a policy of `residency` decides; where the
two paths are two media, `copy.py` fills the second one.
"""

from __future__ import annotations

from spdk_kv.paths.orchestrator import Orchestrator
from spdk_kv.paths.order import ScanOrder
from spdk_kv.paths.units import TrackedUnit, UnitGroup

__all__ = ["Orchestrator", "ScanOrder", "TrackedUnit", "UnitGroup"]
