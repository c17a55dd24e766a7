"""Which units belong into the page cache: policies, pure functions of numbers. No I/O, no clock."""

from __future__ import annotations

from spdk_kv.residency.policies import Decision, Observation, Policy, Unit, make_policy

__all__ = ["Decision", "Observation", "Policy", "Unit", "make_policy"]
