"""What a store counts, for whoever watches it: in its process, and from outside.

`sample.py` is all of it at one moment. `published.py` has the file by which the process that has a
store open tells it to others. `names.py` says how each number is called in Prometheus, and
`collector.py` gives them to prometheus-client, which is imported only there.
"""

from __future__ import annotations

from spdk_kv.metrics.collector import Published, Registration, prometheus, register
from spdk_kv.metrics.published import Publisher, Reading, read_published
from spdk_kv.metrics.sample import OPERATIONS, Operation, Path, Sample
from spdk_kv.metrics.times import share_below

__all__ = [
    "OPERATIONS",
    "Operation",
    "Path",
    "Published",
    "Publisher",
    "Reading",
    "Registration",
    "Sample",
    "prometheus",
    "read_published",
    "register",
    "share_below",
]
