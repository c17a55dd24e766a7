"""health.py NODE: what `read_health` says of the drive, before and after 4 MiB are read of it."""

import json
import os
import sys
from dataclasses import asdict

from spdk_kv.devices import read_health

node = sys.argv[1]
found = [read_health(node)]
with open(node, "rb", buffering=0) as drive:
    os.posix_fadvise(drive.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = 4 << 20
    while left:
        left -= len(drive.read(left))
found.append(read_health(node.replace("/nvme", "/ng")))
print(json.dumps([None if each is None else asdict(each) for each in found]))
