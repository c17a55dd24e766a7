"""Whether the kernel reads what guest_io_of_bound.py wrote. argv: the drive's serial."""

import os
import sys

from guest_drive import node_of
from guest_engine import pattern, tell

MIB = 1 << 20
with open(node_of(sys.argv[1]), "rb", buffering=0) as disk:
    tell(same=os.pread(disk.fileno(), MIB, 3 * MIB) == pattern(7, 4 * MIB)[3 * MIB :])
