"""Waiting for what happens on another thread or in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Long enough for the busiest machine: what never happens ends the test, however long that takes.
PATIENCE_S = 120.0


def wait_until(true: Callable[[], T], what: str = "it never happens") -> T:
    """What ``true()`` returns, once it is no longer false; fails with ``what`` if it never is."""
    last = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < last, what
        time.sleep(0.002)
    return found
