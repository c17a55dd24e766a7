"""Takes a drive, writes and reads it over VFIO, gives it back, and lets the kernel read it.

argv: the drive's serial. The kernel wrote a part first, which the engine must read.
"""

import os
import sys

from drive import driver_of, give_back, node_of, take
from engine import open_drive, pattern, read, read_direct, tell, write

MIB = 1 << 20
serial = sys.argv[1]

with open(node_of(serial), "r+b", buffering=0) as disk:
    disk.write(pattern(1, MIB))
    os.fsync(disk.fileno())

address = take(serial)
taken = driver_of(address)
engine = open_drive(address)
facts = {**engine.controller, **engine.namespace}
try:
    assert read(engine, 0, MIB) == pattern(1, MIB), "what the kernel wrote"
    # At a block boundary that is none of 4096 bytes where blocks are smaller; longer than MDTS.
    offset = 3 * MIB + engine.block_nbytes
    data = pattern(2, 5 * MIB)
    write(engine, offset, data)
    engine.flush()
    assert read(engine, offset, len(data)) == data, "through slots"
    assert read_direct(engine, offset, len(data)) == data, "without a copy"
    assert read(engine, offset + 4097, 70001) == data[4097 : 4097 + 70001], "from inside a block"
    assert read(engine, 0, MIB) == pattern(1, MIB), "what was not written to"
    health = engine.health()
finally:
    engine.close()

give_back(address)
with open(node_of(serial), "rb", buffering=0) as disk:
    kernel = os.pread(disk.fileno(), len(data), offset)
    while len(kernel) < len(data):
        kernel += os.pread(disk.fileno(), len(data) - len(kernel), offset + len(kernel))
tell(taken=taken, given=driver_of(address), kernel_reads_the_same=kernel == data,
     facts=facts, health=health)  # fmt: skip
