"""The budget of a measurement: the limit follows what is really held besides the page cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from spdk_kv.binding import MemoryGroup
from spdk_kv.measure import Case, Load, Outcome, cached_share, limits
from spdk_kv.measure.decode.held import Budget, HeldMemory
from support.waiting import PATIENCE_S

LOAD = Load(layers=2, hidden=256, batch=2, prompt=64, generate=4)


class Group(MemoryGroup):
    """A folder with the files of a cgroup, and no kernel behind it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 2)
        self.hold(0)

    def hold(self, other: int, cache: int = 7000) -> None:
        self._set("memory.stat", f"file {cache}\nshmem 0\n")
        self._set("memory.current", f"{cache + other}\n")

    def _set(self, name: str, text: str) -> None:
        """All at once, as the kernel's files change."""
        new = self.path / f"{name}.new"
        new.write_text(text)
        new.replace(self.path / name)

    @property
    def limited(self) -> int:
        return int((self.path / "memory.max").read_text())


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def test_the_most_that_was_held_is_taken_once(group: Group) -> None:
    held = HeldMemory(group, interval_s=1e-3)
    try:
        group.hold(9000)
        deadline = time.monotonic() + PATIENCE_S
        while held._most_nbytes < 9000:
            assert time.monotonic() < deadline
        group.hold(2000)
        assert held.take() == 9000
        assert held.take() == 2000
    finally:
        held.close()
    assert not held._thread.is_alive()


def test_nothing_that_was_held_before_is_noted_after_it_was_taken(group: Group) -> None:
    looks: list[bool] = []

    class Watched(Group):
        def use(self) -> Any:
            looks.append(held._lock.locked())
            return super().use()

    held = HeldMemory(Watched(group.path), interval_s=1e6)
    held.take()
    held.close()
    assert looks == [True]


def test_page_cache_that_comes_between_two_files_is_not_other_memory(group: Group) -> None:
    class Growing(Group):
        def stat(self) -> dict[str, int]:
            found = super().stat()
            self.hold(100, cache=1_000_000)
            return found

    assert Growing(group.path).use().other_nbytes == 0
    assert group.use().other_nbytes == 100


def test_what_falls_free_after_the_prompt_is_not_given_to_the_page_cache(group: Group) -> None:
    alone = Outcome("dual", None, steps_other_nbytes=[3000, 2500], other_nbytes=8000)
    fields = limits(alone, 1000)
    case = Case("dual", "/", {}, **fields)
    # The prompt needs its peak; decoding begins with what a run alone held while decoding.
    assert (case.limit_nbytes, case.cache_nbytes, case.held_nbytes) == (9000, 1000, 3000)
    budget = Budget(group, 1000, 3000)
    assert group.limited == budget.limit_nbytes == 4000
    budget.follow(2000)
    assert group.limited == 3000
    budget.follow(2004)  # near enough: each change may reclaim
    assert group.limited == 3000
    budget.change(500)
    assert group.limited == 2504
    budget.follow(2600)
    assert group.limited == 3100


def test_the_share_that_was_left_is_the_median_of_the_later_steps() -> None:
    left = [LOAD.nbytes, LOAD.nbytes, 100, 300, 200]
    outcome = Outcome("dual", 1, steps_s=[1.0] * 5, steps_cached_nbytes=left)
    assert cached_share(outcome, LOAD) == pytest.approx(200 / LOAD.nbytes)
    assert cached_share(Outcome("dual", None, steps_s=[1.0]), LOAD) is None
    assert Outcome("dual", None, other_nbytes=5).held_nbytes == 5
