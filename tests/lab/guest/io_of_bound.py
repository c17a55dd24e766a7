"""Writes and reads a drive that setup_vfio.py has bound. argv: its PCI address."""

import sys

from engine import open_drive, pattern, read, tell, write

MIB = 1 << 20
engine = open_drive(sys.argv[1])
write(engine, 0, pattern(7, 4 * MIB))
engine.flush()
same = read(engine, 0, 4 * MIB) == pattern(7, 4 * MIB)
engine.close()
tell(same=same)
