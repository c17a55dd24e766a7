"""Turns the power of a drive's slot off behind its driver's back. argv: the drive's PCI address.

PCI Express Base 5.0, section 7.5.3.10: bit 10 of Slot Control is the power controller (1: off),
bits 9:8 are the power indicator (3: off). QEMU takes the card out when both say so.
"""

import os
import struct
import sys

from drive import DEVICES
from engine import tell

PCI_EXPRESS, SLOT_CONTROL = 0x10, 0x18

port = os.path.dirname(os.path.realpath(DEVICES / sys.argv[1]))
with open(f"{port}/config", "r+b", buffering=0) as config:
    space = config.read(256)
    at = space[0x34]
    while space[at] != PCI_EXPRESS:
        at = space[at + 1]
    (control,) = struct.unpack_from("<H", space, at + SLOT_CONTROL)
    config.seek(at + SLOT_CONTROL)
    config.write(struct.pack("<H", control | 1 << 10 | 3 << 8))
tell(port=os.path.basename(port))
