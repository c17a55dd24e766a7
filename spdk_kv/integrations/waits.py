"""Waits for a drive, which end when the drive is done and not before, and are said in the log.

Nobody can keep a drive from using memory for what it was told to do. So a host that wants its
memory back waits, and whoever looks at it should see what for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

# After how long it is said, and how often it is said again.
_SAID_AFTER_S = 5.0
_SAID_EVERY_S = 30.0


def wait(is_over: Callable[[float], bool], what_for: Callable[[], str]) -> None:
    """Returns once ``is_over``, which blocks for so many seconds at most until it is. ``what_for``
    is what the log is told; "" where that is nothing."""
    patience_s = _SAID_AFTER_S
    while not is_over(patience_s):
        patience_s = _SAID_EVERY_S
        if text := what_for():
            log.warning("%s; it may use the host's memory until then, which is not given up", text)
