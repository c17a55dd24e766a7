"""Waiting for what happens on another thread or in another process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
# Long enough for the busiest machine: what never happens ends the test, however long that takes.
PATIENCE_S = 120.0
# For a process that does a lot. A test may take longer still (pyproject.toml).
PROCESS_PATIENCE_S = 480.0


def wait_until(true: Callable[[], T], what: str = "it never happens") -> T:
    """What ``true()`` returns, once it is no longer false; fails with ``what`` if it never is."""
    last = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < last, what
        time.sleep(0.002)
    return found


@contextmanager
def in_use(lock: Any) -> Iterator[None]:
    """Another thread holds ``lock``, and nobody waits until it does no longer."""
    holds, done = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def use() -> None:
        with lock:
            holds.set()
            in_time.append(done.wait(PATIENCE_S))

    user = threading.Thread(target=use)
    user.start()
    assert holds.wait(PATIENCE_S)
    try:
        yield
    finally:
        done.set()
        user.join()
    assert in_time == [True], "somebody waited for it"
