"""Policies: which units belong in the page cache. Pure functions of numbers; no I/O, no clock.

`policies.py` has the simple ones and `make_policy`. `adaptive.py` is the default: `budget.py` moves
its budget, `edge.py` learns where the kernel evicts, `misses.py` excuses misses that do not count.
"""

from __future__ import annotations

from spdk_kv.residency.order import spread
from spdk_kv.residency.policies import Decision, Observation, Policy, Unit, make_policy

__all__ = ["Decision", "Observation", "Policy", "Unit", "make_policy", "spread"]
