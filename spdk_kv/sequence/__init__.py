"""Sequences: the KV cache of one request, layer by layer, on contiguous extents.

Begin with `sequence.py`; `layer.py` appends and reads one layer, `reading.py` is one read of it,
`ahead.py` reads before it is asked to.
"""

from __future__ import annotations

from spdk_kv.sequence.sequence import Sequence

__all__ = ["Sequence"]
