"""Work in parts: each once, on other threads where it is worth it, with errors and forks."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from spdk_kv.sparse import Selector, Settings
from spdk_kv.sparse.threads import in_parts
from support.waiting import PATIENCE_S

MUCH = 1 << 40


@pytest.fixture(autouse=True)
def three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("parts", [0, 1, 2, 7])
@pytest.mark.parametrize("cost", [0, MUCH])
def test_each_part_is_done_once(parts: int, cost: int) -> None:
    done: list[int] = []
    in_parts(done.append, parts, cost)
    assert sorted(done) == list(range(parts))


def test_as_many_threads_as_torch_has_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=PATIENCE_S)
    in_parts(lambda part: together.wait(), 6, MUCH)


@pytest.mark.parametrize("threads", [1, 3])
def test_little_work_or_one_thread_stays_on_the_caller_s(threads: int) -> None:
    torch.set_num_threads(threads)
    seen = set()
    in_parts(lambda part: seen.add(threading.get_ident()), 20, 0 if threads > 1 else MUCH)
    assert seen == {threading.get_ident()}


def test_an_error_on_any_thread_is_raised_when_nothing_runs_any_more() -> None:
    together, ended = threading.Barrier(3, timeout=PATIENCE_S), []

    def work(part: int) -> None:
        together.wait()
        if part == 1:
            raise MemoryError("no room")
        ended.append(part)

    with pytest.raises(MemoryError, match="no room"):
        in_parts(work, 3, MUCH)
    assert sorted(ended) == [0, 2]


def test_a_forked_child_has_threads_of_its_own() -> None:
    in_parts(lambda part: None, 3, MUCH)
    child = os.fork()
    if not child:
        status = 1
        try:
            together = threading.Barrier(3, timeout=PATIENCE_S)
            in_parts(lambda part: together.wait(), 3, MUCH)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_groups_by_any_number_of_threads(batch: int) -> None:
    made = torch.Generator().manual_seed(0)
    selector = Selector(Settings(tokens=256))
    selector.append(torch.randn(batch, 3, 20_000, 64, generator=made))
    q = torch.randn(batch, 9, 64, generator=made)
    q[0, 4] = torch.nan
    found = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        found.append(selector.select(q, whole_groups=5000))
    assert all(np.array_equal(each, found[0]) for each in found)
