"""The index: which record belongs to which key, in SQLite, committed after the data.

`database.py` is the file, `records.py` what a row holds, `commits.py` the count of commits that
shows an old copy.
"""

from __future__ import annotations

from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord, SequenceRecord, UnitRecord

__all__ = ["BlobRecord", "Index", "SequenceRecord", "UnitRecord"]
