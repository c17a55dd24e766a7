"""How fast a decode step would be that reads a part, and which settings to take.

Pure functions of numbers: `costs.py` adds up what a step takes, `reuse.py` says how much of a
selection is resident, `frontier.py` compares shares of the tokens, `choice.py` decides and says
why.
"""

from __future__ import annotations

from spdk_kv.sparse.tuning.choice import Choice, choose
from spdk_kv.sparse.tuning.costs import Cost, Decoding, Machine, ReadTimes, cost, whole_cost
from spdk_kv.sparse.tuning.frontier import SHARES, Goal, best, best_of_shares
from spdk_kv.sparse.tuning.reuse import MISS_RATES, miss_rate

__all__ = [
    "MISS_RATES",
    "SHARES",
    "Choice",
    "Cost",
    "Decoding",
    "Goal",
    "Machine",
    "ReadTimes",
    "best",
    "best_of_shares",
    "choose",
    "cost",
    "miss_rate",
    "whole_cost",
]
