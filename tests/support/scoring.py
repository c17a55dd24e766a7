"""Which implementations of scoring this processor can run."""

from __future__ import annotations

import numpy as np

from spdk_kv._native import score


def usable() -> list[str]:
    found = []
    for name in ("avx2", "portable"):
        try:
            score.top_groups(np.zeros(1, np.float32), 0, np.empty(0, np.int64), name)
        except LookupError:
            continue
        found.append(name)
    return found


NAMES = usable()
