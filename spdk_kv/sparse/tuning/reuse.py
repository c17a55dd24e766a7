"""How much of a step's selection is still in memory, as measured on a real model.

SmolLM2-135M, 2-bit codes, groups of 4, 224 tokens selected of 3,000, four texts, three tasks
(bench/results/2026-11-29_reading_a_part).
"""

from __future__ import annotations

import numpy as np

MISS_RATES = {1.0: 0.44, 2.0: 0.31, 4.0: 0.21}
"""Groups to be read per group selected, by size of the pool in multiples of the selection."""


def miss_rate(pool: float) -> float:
    """Interpolated over the logarithm of the pool; beyond 4 times nothing was measured, and the
    rate stays what it is there."""
    return float(np.interp(np.log(pool), np.log(list(MISS_RATES)), list(MISS_RATES.values())))
