"""Scoring in parts at the same time, on as many threads as torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count

import torch

# Multiply-adds that take a tenth of a millisecond, a few times what it takes to wake a thread.
_WORTH_A_THREAD = 4_000_000

# Of all callers together. They are begun when they are needed, whatever cores there are.
_MOST_THREADS = 64

_pool: ThreadPoolExecutor | None = None


def in_parts(work: Callable[[int], object], parts: int, cost: int) -> None:
    """Calls ``work`` with 0 to ``parts`` - 1, each once and in no order, and waits for all.

    This thread takes part, and does all of it where no other is free. An error of ``work`` is
    raised here, once nothing runs any more.

    Args:
        work: what is done; calls have to get along with each other, and release the GIL.
        parts: how many there are.
        cost: multiply-adds of all of them together: little work is done on this thread alone.
    """
    helpers = min(parts, torch.get_num_threads(), cost // _WORTH_A_THREAD) - 1
    if helpers < 1:
        for part in range(parts):
            work(part)
        return
    numbers = count()  # next() of it is atomic

    def help_out() -> None:
        for number in numbers:
            if number >= parts:
                return
            work(number)

    helping = [_workers().submit(help_out) for _ in range(helpers)]
    try:
        help_out()
    finally:
        begun = [each for each in helping if not each.cancel()]
        wait(begun)
    for each in begun:
        each.result()


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="spdk_kv-score")
    return _pool


def _forget() -> None:
    global _pool
    _pool = None  # a forked child has the object, and none of its threads


os.register_at_fork(after_in_child=_forget)
