"""Policies: what belongs in the page cache, what is worth writing. Pure functions of numbers; no
I/O, no clock.

`policies.py` has the simple ones and `make_policy`. `adaptive.py` is the default: `budget.py` moves
its budget, `edge.py` learns where the kernel evicts, `misses.py` excuses misses that do not count.
`write_budget.py` spares the drive.
"""

from __future__ import annotations

from spdk_kv.residency.order import spread
from spdk_kv.residency.policies import Decision, Observation, Policy, Unit, make_policy
from spdk_kv.residency.write_budget import Admission, WriteBudget

__all__ = [
    "Admission",
    "Decision",
    "Observation",
    "Policy",
    "Unit",
    "WriteBudget",
    "make_policy",
    "spread",
]
