"""Owns a drive until it is killed, with a write finished and reads in flight.

argv: its serial, to take it by hand; or its PCI address, where it is on vfio-pci already."""

import ctypes
import sys

from drive import take
from engine import open_drive, pattern, write

from spdk_kv._native.transfer import READ

MIB = 1 << 20
place = sys.argv[1]
engine = open_drive(place if ":" in place else take(place))
write(engine, 0, pattern(5, 2 * MIB))
engine.flush()
memory = ctypes.create_string_buffer(2 * MIB)
print("owned", flush=True)
while True:
    transfer = engine.transfer(READ)
    transfer.add(0, ctypes.addressof(memory), len(memory))
    engine.run(transfer)
