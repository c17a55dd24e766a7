"""The published contracts find faults: engines and policies with one each are run through them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from spdk_kv.engines import QueueOptions
from spdk_kv.engines.memory import RamEngine
from spdk_kv.residency import Decision, Observation, Unit
from spdk_kv.testing import EngineContract, Medium, PolicyContract


class KeepsWhatItDiscards(RamEngine):
    def discard(self, offset: int, nbytes: int, timeout_s: float | None = None) -> bool:
        return True


class CutsNothing(RamEngine):
    def __init__(self, capacity_nbytes: int, options: QueueOptions) -> None:
        super().__init__(capacity_nbytes, QueueOptions(depth=4, segment_nbytes=1 << 20))


class SumsNothing(RamEngine):
    def transfer(self, op: int, **how: Any) -> Any:
        return super().transfer(op)


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (KeepsWhatItDiscards, "test_flush_and_discard"),
        (CutsNothing, "test_a_transfer_is_cut_at_the_segment_size"),
        (SumsNothing, "test_many_pieces_go_where_each_belongs"),
    ],
)
def test_a_faulty_engine_is_found(kind: type[RamEngine], test: str) -> None:
    contract = EngineContract()
    for engine_type in (RamEngine, kind):
        engine = engine_type(2 * contract.area_nbytes, contract.options)
        if engine_type is RamEngine:
            getattr(contract, test)(Medium(engine))
        else:
            with pytest.raises(AssertionError):
                getattr(contract, test)(Medium(engine))
        engine.close()


class Good:
    name = "mine"

    def __init__(self) -> None:
        self.last: frozenset[object] = frozenset()

    def room(self, seen: Observation) -> int:
        return seen.available_nbytes

    def decide(
        self, units: Sequence[Unit], cached: frozenset[object], seen: Observation
    ) -> Decision:
        left = self.room(seen)
        taken = []
        for unit in units:
            if unit.nbytes <= left:
                taken.append(unit.key)
                left -= unit.nbytes
        self.last = frozenset(taken)
        return Decision(self.last, seen.available_nbytes, "what fits")

    def why(self, unit: Unit) -> str:
        return "page cache: it fits" if unit.key in self.last else "direct: it does not"


class ExceedsTheBudget(Good):
    def room(self, seen: Observation) -> int:
        return 1 << 50


class SharesItsState(Good):
    calls: list[int] = []  # noqa: RUF012

    def room(self, seen: Observation) -> int:
        self.calls.append(0)
        return seen.available_nbytes // len(self.calls)


class ChangesItsInput(Good):
    def decide(
        self, units: Sequence[Unit], cached: frozenset[object], seen: Observation
    ) -> Decision:
        units.reverse()  # type: ignore[attr-defined]
        return super().decide(units, cached, seen)


class ExplainsNothing(Good):
    def why(self, unit: Unit) -> str:
        return "because"


def run_policy(kind: type[Good]) -> None:
    """The contract's property, with the one example that all these fail."""
    contract = type("Contract", (PolicyContract,), {"make_policy": lambda self: kind()})()
    units = [Unit((0, layer, part), 40) for layer in range(2) for part in (0, 1)]
    contract.test_decisions_keep_the_contract.hypothesis.inner_test(  # type: ignore[attr-defined]
        contract, [(units, Observation(100), True)]
    )


def test_a_good_policy_passes() -> None:
    run_policy(Good)


@pytest.mark.parametrize(
    "kind", [ExceedsTheBudget, SharesItsState, ChangesItsInput, ExplainsNothing]
)
def test_a_faulty_policy_is_found(kind: type[Good]) -> None:
    with pytest.raises(AssertionError):
        run_policy(kind)


@pytest.mark.parametrize("module", ["spdk_kv", "spdk_kv.testing"])
def test_nothing_but_a_contract_imports_pytest(module: str) -> None:
    """Scripts that end processes use a medium alone, and start quickly."""
    script = f"import sys, {module}; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
