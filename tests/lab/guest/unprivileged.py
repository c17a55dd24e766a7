"""Writes and reads a drive as the user who runs this. argv: the drive's PCI address."""

import os
import sys

from engine import open_drive, pattern, read, tell, write

from spdk_kv.engines.spdk import environment

MIB = 1 << 20
assert os.getuid() != 0
# Hugepages belong to root here: this is what ordinary users get.
environment.configure(environment.SpdkSettings(hugepages=False, memory_nbytes=128 * MIB))
try:
    engine = open_drive(sys.argv[1], depth=4)
except Exception as error:
    tell(kind=type(error).__name__, text=str(error))
    sys.exit()
write(engine, MIB, pattern(6, 3 * MIB))
same = read(engine, MIB, 3 * MIB) == pattern(6, 3 * MIB)
engine.close()
tell(kind="opened", same=same)
