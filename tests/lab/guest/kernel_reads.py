"""Whether the kernel reads what an engine wrote at the start of a drive.

argv: the drive's serial, the seed of the pattern.
"""

import os
import sys

from drive import node_of
from engine import pattern, tell

MIB = 1 << 20
with open(node_of(sys.argv[1]), "rb", buffering=0) as disk:
    tell(same=os.pread(disk.fileno(), MIB, MIB) == pattern(int(sys.argv[2]), 2 * MIB)[MIB:])
