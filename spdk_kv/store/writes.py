"""The write budget of an open store: what its drive has written, and whether more is worth it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from spdk_kv.engines import Engine
from spdk_kv.errors import SpdkKvError, WriteBudgetSpent
from spdk_kv.index import Index
from spdk_kv.residency import Admission, WriteBudget
from spdk_kv.units import format_nbytes

log = logging.getLogger(__name__)

WRITE_BUDGET_LEFT = "write_budget_left"
"""The name in the index of what is left of the budget, and since when."""

# A change of this share of a burst is kept by the next flush: what a crash forgets is no more.
_KEPT_SHARE = 1 / 256


class Writes:
    """What ``engine`` may still write by ``budget`` (None: everything). Thread-safe.

    All that the drive writes counts, sequences and compaction as well; blobs alone are declined.
    What is left is kept in ``index`` (None: nothing is), so that a restart does not give a new
    budget.
    """

    def __init__(self, budget: WriteBudget | None, engine: Engine, index: Index | None) -> None:
        self._engine = engine
        self._index = index
        self._lock = threading.Lock()
        # Held while the index is written, by nobody who puts.
        self._keeping = threading.Lock()
        self._admission: Admission | None = None
        self._kept_nbytes = 0.0
        if budget is not None:
            self._admission = _restored(budget, index, self._written_nbytes())
            self._kept_nbytes = self._admission.left_nbytes

    def _written_nbytes(self) -> int:
        return self._engine.written_nbytes

    def check(self) -> None:
        """Raises WriteBudgetSpent where nothing is left."""
        admission = self._admission
        if admission is None:
            return
        with self._lock:
            admission.update(time.time(), self._written_nbytes())
            left, budget = admission.left_nbytes, admission.budget
            if left > 0:
                return
            admission.declined += 1
        wait_s = (1 - left) / budget.nbytes_per_s
        raise WriteBudgetSpent(
            f"the write budget of {budget} is spent: {format_nbytes(-left)} more were written; "
            f"something is left again in {wait_s:.0f} s. A larger write_budget= writes more"
        )

    def admits(self, nbytes_of: Mapping[str, int]) -> list[bool]:
        """For each key whether it is worth writing so many bytes, as :class:`Admission` decides."""
        admission = self._admission
        if admission is None:
            return [True] * len(nbytes_of)
        found, promised = [], 0
        with self._lock:
            admission.update(time.time(), self._written_nbytes())
            for key, nbytes in nbytes_of.items():
                # A hash, since keys may be long.
                found.append(admission.admits(hash(key), nbytes, promised))
                promised += nbytes if found[-1] else 0
        return found

    def keep(self) -> None:
        """Notes in the index what is left, where that changed by much; blocks on its disk. Nothing
        is lost where that fails, so it is logged only."""
        admission, index = self._admission, self._index
        if admission is None or index is None:
            return
        with self._keeping:  # or of two at once the older could come last
            with self._lock:
                now_s = time.time()
                admission.update(now_s, self._written_nbytes())
                left = admission.left_nbytes
            if abs(left - self._kept_nbytes) < _KEPT_SHARE * admission.budget.burst_nbytes:
                return
            try:
                index.set_meta(WRITE_BUDGET_LEFT, json.dumps([left, now_s]))
                self._kept_nbytes = left
            except SpdkKvError as failure:
                log.warning("what is left of the write budget is not kept: %s", failure)

    def stats(self) -> dict[str, Any] | None:
        """The budget, what is left of it, and how many writes were declined; None without one."""
        admission = self._admission
        if admission is None:
            return None
        with self._lock:
            admission.update(time.time(), self._written_nbytes())
            return {
                "budget_nbytes": admission.budget.nbytes,
                "period_s": admission.budget.period_s,
                "left_nbytes": int(admission.left_nbytes),
                "declined": admission.declined,
            }


def _restored(budget: WriteBudget, index: Index | None, written_nbytes: int) -> Admission:
    """With what was left when the store was closed."""
    left_nbytes, then_s = None, time.time()
    kept = None if index is None else index.get_meta(WRITE_BUDGET_LEFT)
    if kept is not None:
        left_nbytes, then_s = json.loads(kept)
    return Admission(budget, now_s=then_s, left_nbytes=left_nbytes, written_nbytes=written_nbytes)
