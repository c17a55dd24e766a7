"""The index: which record belongs to which key, in SQLite, committed after the data.

`database.py` is the file, which `connection.py` opens and `creation.py` makes, `records.py` what a
row holds, `sequences.py` the record of a sequence, `batches.py` a commit of any size,
`checks.py` whether it is whole, `summary.py` all blobs in one file, for a fast open, and
`changes.py` what changed since,
`space.py` what the filesystem must have left, `commits.py` the count of commits that shows an old
copy, `reader.py` reads an index beside its writer, with `log.py` and `snapshot.py`.
"""

from __future__ import annotations

from spdk_kv.index.batches import commit_in_batches
from spdk_kv.index.database import Index
from spdk_kv.index.reader import IndexReader
from spdk_kv.index.records import BlobRecord
from spdk_kv.index.sequences import PieceRecord, SequenceRecord
from spdk_kv.index.snapshot import IndexSnapshot
from spdk_kv.index.space import IndexFull

__all__ = [
    "BlobRecord",
    "Index",
    "IndexFull",
    "IndexReader",
    "IndexSnapshot",
    "PieceRecord",
    "SequenceRecord",
    "commit_in_batches",
]
