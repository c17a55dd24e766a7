"""Contracts as tests: for whoever writes an engine, or a residency policy.

A contract is a base class for pytest. Derive from it, say how yours is made, and pytest runs what
every engine, or every policy, has to do. spdk_kv's own are tested with the same classes. Needs
pytest and hypothesis (``pip install spdk_kv[testing]``), which nothing else of the package imports.

An engine::

    import pytest
    from spdk_kv.testing import EngineContract, Medium

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def medium(self, tmp_path):
            engine = MyEngine(tmp_path / "data", self.options)
            engine.ensure(self.area_nbytes)
            yield Medium(engine)
            engine.close()

A policy::

    from spdk_kv.testing import PolicyContract

    class TestMyPolicy(PolicyContract):
        def make_policy(self):
            return MyPolicy()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spdk_kv.testing.medium import SMALL, Medium, address_of, memory, read, write

if TYPE_CHECKING:
    from spdk_kv.testing.engines import EngineContract, TransferContract
    from spdk_kv.testing.policies import PolicyContract

__all__ = [
    "SMALL",
    "EngineContract",
    "Medium",
    "PolicyContract",
    "TransferContract",
    "address_of",
    "memory",
    "read",
    "write",
]


def __getattr__(name: str) -> Any:
    # On the first use, so that what only needs a medium starts without pytest.
    if name not in ("EngineContract", "TransferContract", "PolicyContract"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # Before the import: a failed assertion then shows its values.
    pytest.register_assert_rewrite("spdk_kv.testing.engines", "spdk_kv.testing.policies")
    from spdk_kv.testing import engines, policies

    return getattr(policies if name == "PolicyContract" else engines, name)
