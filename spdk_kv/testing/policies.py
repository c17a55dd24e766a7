"""The contract of a residency policy: what holds for every one, whatever it is told."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spdk_kv.residency import Decision, Observation, Policy, Unit

nbytes = st.integers(0, 1 << 40) | st.integers(0, 100)
unit_lists = st.lists(
    st.builds(
        Unit,
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 1)),
        nbytes,
        st.sampled_from([0.0, 0.5, 1.0, 7.0]),
        st.integers(0, 300),
        nbytes,
        st.integers(0, 3),
    ),
    max_size=24,
    unique_by=lambda unit: unit.key,
)
observations = st.builds(
    Observation, nbytes, nbytes, nbytes, st.floats(0, 100, width=32), st.none() | nbytes
)
# Units, what was seen, and whether the caller could do what was decided.
steps = st.lists(st.tuples(unit_lists, observations, st.booleans()), max_size=8)

_NONE: frozenset[object] = frozenset()


class PolicyContract:
    """What holds for every residency policy; a subclass says how its policy is made.

    ``holds_budget`` and ``holds_available`` may be set to False by a policy that is meant to exceed
    them: one that binds units for good, or one that ignores the available memory.
    """

    holds_budget = True
    """The units on the page-cache path never have more bytes than ``Decision.budget_nbytes``."""
    holds_available = True
    """``Decision.budget_nbytes`` never exceeds ``Observation.available_nbytes``."""

    def make_policy(self) -> Policy:
        """A new policy, with no state of any other."""
        raise NotImplementedError(f"{type(self).__name__} needs a method `make_policy`")

    @given(steps)
    @settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    def test_decisions_keep_the_contract(
        self, steps: list[tuple[list[Unit], Observation, bool]]
    ) -> None:
        policy, same, stranger = self.make_policy(), self.make_policy(), self.make_policy()
        cached: frozenset[object] = _NONE
        for units, seen, follows in steps:
            given_units = deepcopy(units)
            decision = policy.decide(units, cached, seen)
            assert units == given_units, "a policy changed its input"
            # Another policy's calls make no difference; the same calls give the same answers.
            stranger.decide(units[::2], _NONE, Observation(seen.available_nbytes // 2))
            assert decision == same.decide(units, cached, seen)
            self.check_decision(units, seen, decision)
            for unit in units:
                path = "page cache: " if unit.key in decision.cached else "direct: "
                assert policy.why(unit).startswith(path)
            if follows:
                cached = decision.cached

    def check_decision(self, units: list[Unit], seen: Observation, decision: Decision) -> None:
        """One decision, by itself."""
        sizes = {unit.key: unit.nbytes for unit in units}
        assert decision.cached <= sizes.keys()
        if self.holds_budget:
            assert sum(sizes[key] for key in decision.cached) <= decision.budget_nbytes
        if self.holds_available:
            assert decision.budget_nbytes <= seen.available_nbytes
        assert decision.reason
        assert "\n" not in decision.reason

    def test_no_units_are_no_decision(self) -> None:
        for available_nbytes in (0, 1 << 30):
            decision = self.make_policy().decide([], _NONE, Observation(available_nbytes))
            assert decision.cached == _NONE

    def test_keys_that_are_gone_are_ignored(self) -> None:
        lost = Observation(1 << 30, missed_nbytes=1 << 30)
        decision = self.make_policy().decide([], frozenset({"gone"}), lost)
        assert decision.cached == _NONE

    def test_two_units_with_one_key_are_refused(self) -> None:
        twice = [Unit("a", 1), Unit("a", 2)]
        with pytest.raises(ValueError, match="'a'"):
            self.make_policy().decide(twice, _NONE, Observation(5))

    def test_a_unit_that_is_new_since_the_decision_is_explained(self) -> None:
        policy = self.make_policy()
        policy.decide([Unit("a", 1)], _NONE, Observation(1 << 30))
        assert policy.why(Unit("new", 1)).startswith(("page cache: ", "direct: "))
