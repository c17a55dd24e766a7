"""The index: which record belongs to which key, in SQLite, committed after the data.

`database.py` is the file, `records.py` what a row holds, `sequences.py`
the record of a sequence, `batches.py` a commit of any size,
`space.py` what the filesystem must have left, `commits.py` the count of commits that shows an old
copy.
"""

from __future__ import annotations

from spdk_kv.index.batches import commit_in_batches
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
from spdk_kv.index.sequences import PieceRecord, SequenceRecord
from spdk_kv.index.space import IndexFull

__all__ = [
    "BlobRecord",
    "Index",
    "IndexFull",
    "PieceRecord",
    "SequenceRecord",
    "commit_in_batches",
]
