"""After the owner of a drive was killed: what it left, and the drive's way back to the kernel.

argv: the drive's serial, its PCI address.
"""

import os
import sys
from pathlib import Path

from drive import driver_of, give_back, node_of, wait_for
from engine import open_drive, pattern, read, tell

MIB = 1 << 20
serial, address = sys.argv[1:]


def free_hugepages() -> tuple[int, int]:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    return tuple(int((pool / f"{name}_hugepages").read_text()) for name in ("free", "nr"))


# Its end takes the kernel a moment.
wait_for(lambda: len(set(free_hugepages())) == 1)
left = [str(path) for path in Path("/dev/hugepages").iterdir()]
driver = driver_of(address)
engine = open_drive(address)
same = read(engine, 0, 2 * MIB) == pattern(5, 2 * MIB)
engine.close()
give_back(address)
with open(node_of(serial), "rb", buffering=0) as disk:
    kernel = os.pread(disk.fileno(), MIB, 0) == pattern(5, MIB)
tell(driver=driver, left=left, next_owner_reads_it=same, kernel_reads_it=kernel)
