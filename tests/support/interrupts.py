"""KeyboardInterrupt at each place in spdk_kv's own code where Ctrl-C may come."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

from support.rounds import LONG


class Interrupt:
    """Raises KeyboardInterrupt at the n-th place in the store's own code where Ctrl-C may.

    The interpreter looks for signals where a function begins and where a call of C has returned;
    a profiler is called at the same places.
    """

    def __init__(self, at: int) -> None:
        self.left = at

    def _profile(self, frame, event, _) -> None:
        if event in ("call", "c_return") and "/spdk_kv/" in frame.f_code.co_filename:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt  # which ends the profiling, too

    def run(self, call: Callable[[], object]) -> bool:
        """Whether it came to the interrupt."""
        report = sys.unraisablehook

        def report_others(unraisable) -> None:
            if unraisable.exc_type is not KeyboardInterrupt:  # swallowed by a finalizer
                report(unraisable)

        sys.unraisablehook = report_others
        sys.setprofile(self._profile)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
            sys.unraisablehook = report
        return self.left <= 0  # it came where exceptions are swallowed: in a finalizer


def interrupted_everywhere(prepare, call, check, step: int = 1) -> int:
    """Runs ``call`` again and again, interrupted ``step`` places later each time, until it is not.

    Where it begins is fixed, and drawn in the long suite: what a step leaves out is found there.
    """
    at = random.randrange(step) if LONG else 0
    while True:
        at += step
        prepare(at)
        if not Interrupt(at).run(lambda at=at: call(at)):
            return at
        check(at)
