"""What `spdk-kv tune` measures: scattered reads of a drive, scoring, and the speed of weights.

`machine.py` measures everything: `groups.py` fills a sequence and reads groups of it, `scoring.py`
selects by synthetic keys, and `weights.py` multiplies matrices as a decode step does.
"""

from __future__ import annotations

from spdk_kv.measure.sparse.groups import GroupReads, filled_sequence, read_groups, read_whole
from spdk_kv.measure.sparse.machine import Measured, Subject, measure_machine
from spdk_kv.measure.sparse.scoring import Scoring, time_selection
from spdk_kv.measure.sparse.weights import weights_nbytes_per_s

__all__ = [
    "GroupReads",
    "Measured",
    "Scoring",
    "Subject",
    "filled_sequence",
    "measure_machine",
    "read_groups",
    "read_whole",
    "time_selection",
    "weights_nbytes_per_s",
]
