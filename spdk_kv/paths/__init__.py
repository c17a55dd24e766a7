"""Two paths behind one door: each unit is read directly or through the page cache.

`orchestrator.py` moves units by what a policy of `residency` decides. `routes.py` chooses the
engine for each read, `admission.py` limits reading ahead, `accounting.py` says what was done and
why. Where the page cache cannot reach the drive, `copy.py` fills it with copies.
"""

from __future__ import annotations

from spdk_kv.paths.admission import ReadAheadAdmission
from spdk_kv.paths.orchestrator import Orchestrator
from spdk_kv.paths.order import ScanOrder
from spdk_kv.paths.units import TrackedUnit, UnitGroup

__all__ = ["Orchestrator", "ReadAheadAdmission", "ScanOrder", "TrackedUnit", "UnitGroup"]
