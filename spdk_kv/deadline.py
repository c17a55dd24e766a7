"""When a caller stops waiting, over all the waits of one call."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from spdk_kv._native.holding import Held
from spdk_kv.errors import DeviceTimeout

# What is left of a deadline that is past: a timeout is a positive number.
_HARDLY_ANY_S = 1e-6


class Deadline:
    """``timeout_s`` seconds from now; None is never.

    It ends a wait and nothing else: what the caller waited for goes on. ValueError unless
    ``timeout_s`` is positive.
    """

    __slots__ = ("_timeout_s", "_until")

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be a positive number, not {timeout_s!r}")
        self._timeout_s = timeout_s
        self._until = 0.0 if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Seconds until then, hardly any where it is past; None for ever."""
        if self._timeout_s is None:
            return None
        return max(_HARDLY_ANY_S, self._until - time.monotonic())

    @property
    def is_past(self) -> bool:
        """Whether it is over."""
        return self._timeout_s is not None and time.monotonic() >= self._until

    def hold(
        self, lock: Any, what: str = "another call on the same sequence"
    ) -> AbstractContextManager[Any]:
        """A context in which ``lock`` is held. DeviceTimeout where another thread keeps it past the
        deadline, for ``what``."""
        left = self.left_s()
        return lock if left is None else Held(lock, min(left, 1e6), partial(self.error, what))

    def error(self, what: str) -> DeviceTimeout:
        """The error of a caller that waited for ``what``."""
        return DeviceTimeout(
            f"{what} was not over after {self._timeout_s:.3g} s; only the wait for it ended"
        )


NEVER = Deadline(None)
"""For callers that wait as long as it takes."""


class Busy(Exception):
    """Another thread holds the lock."""


def if_free(lock: Any) -> AbstractContextManager[Any]:
    """A context in which ``lock`` is held; raises Busy at once where another thread has it."""
    return Held(lock, 0.0, Busy)
