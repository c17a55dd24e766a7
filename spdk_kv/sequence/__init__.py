"""Sequences: the KV cache of one request, layer by layer, on contiguous extents.

Begin with `sequence.py`, then `layer.py`, which joins the halves of a layer: `writer.py`,
`reader.py` and `tail.py`, over the facts in `contents.py`. `reading.py` is one read under way,
`groups.py` one of scattered tokens,
`recorder.py` makes a sequence last, `ahead.py` reads before it is asked to.
"""

from __future__ import annotations

from spdk_kv.sequence.groups import GroupReading
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.opening import create_sequence, restore_sequence
from spdk_kv.sequence.sequence import Sequence

__all__ = ["GroupReading", "Host", "Sequence", "create_sequence", "restore_sequence"]
