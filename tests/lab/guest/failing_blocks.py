"""Reads blocks that the medium has lost, and those around them.

argv: the drive's serial, the lost blocks of 512 bytes.
"""

import sys

from drive import give_back, node_of, take
from engine import open_drive, pattern, read, tell, write

from spdk_kv.errors import DeviceError

MIB = 1 << 20
serial, *numbers = sys.argv[1:]
lost = [int(number) for number in numbers]
data = pattern(4, 4 * MIB)
address = take(serial)
engine = open_drive(address, segment_nbytes=64 << 10)
write(engine, 0, data)
engine.flush()


def attempt(offset: int, nbytes: int) -> dict:
    try:
        same = read(engine, offset, nbytes) == data[offset : offset + nbytes]
    except DeviceError as error:
        return {
            "kind": type(error).__name__, "text": str(error), "op": error.op,
            "offset": error.offset, "status": error.status,
        }  # fmt: skip
    return {"kind": "same" if same else "other bytes"}


first, after = lost[0] * 512, (lost[-1] + 1) * 512
answers = {
    "before": attempt(0, first),
    "lost": attempt(first, 512),
    "across": attempt(0, len(data)),
    "after": attempt(after, len(data) - after),
    "between": attempt(first - 4096, 4096),
}
gone = engine.gone
engine.close()
give_back(address)
node_of(serial)
tell(**answers, gone=gone)
