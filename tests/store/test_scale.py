"""A hundred thousand blobs: what they cost in memory, and that all of them come back."""

from __future__ import annotations

import json
import sys

from store.helpers import folder_fixture, python

folder = folder_fixture

# Measured in a process of its own, as growth of its resident memory (the heap is trimmed first,
# so that what is counted is held, not just kept for later). Keys of 24 characters, one block each.
_SCRIPT = """
import ctypes, gc, json, sys
import numpy as np
import spdk_kv

COUNT = 100_000

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))

def open_it():
    engine = spdk_kv.EngineOptions("pagecache", depth=4, segment="64 KiB")
    return spdk_kv.open(f"file://{sys.argv[1]}", capacity="512 MiB", engine=engine,
                        flush_interval_s=None)

array = np.zeros(16, np.float16)
with open_it() as store:  # what the first put of all brings into memory is not the blobs'
    store.put("first", array)
    before = resident()
    for at in range(0, COUNT, 1000):
        store.put_many({f"document/{i:015}": array for i in range(at, at + 1000)})
    store.flush()
    grown = resident() - before
del store
before = resident()
with open_it() as store:
    reopened = resident() - before
    found = len(store), len(store.keys("document/")), store.stats()["used_nbytes"]
    assert store.keys()[-1] == f"document/{COUNT - 1:015}"
    assert (store.get(f"document/{COUNT // 2:015}", as_numpy=True) == 0).all()
    store.catalog.records.extents.allocator.check()
print(json.dumps({"grown": grown, "reopened": reopened, "found": found}))
"""


def test_100_000_blobs_take_less_than_100_mib_of_memory(folder):
    ran = python(_SCRIPT, str(folder))
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    print(measured, file=sys.stderr)
    assert measured["found"] == [100_001, 100_000, 100_001 * 4096]
    assert measured["grown"] <= 100 << 20
    assert measured["reopened"] <= 100 << 20
