"""Reads a drive without end, until that fails; tells how it failed and what came then.

argv: the drive's serial; ``ng``: through the kernel's generic node, otherwise over VFIO;
``keep``: end without closing. Prints `reading ADDRESS` when reads are in flight. Every buffer that
was read is compared.
"""

import os
import sys
import threading
import time

from drive import address_of, node_of, take
from engine import open_drive, pattern, read, tell, write

from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.errors import DeviceError

MIB = 1 << 20
data = pattern(3, 8 * MIB)
if "ng" in sys.argv:
    address = address_of(sys.argv[1])
    node = node_of(sys.argv[1]).replace("/nvme", "/ng")
    engine = open_engine(parse_location(f"ng://{node}"), options=QueueOptions(16, 128 << 10))
else:
    address = take(sys.argv[1])
    engine = open_drive(address, segment_nbytes=128 << 10)
write(engine, 0, data)
good = 0
failures = []
counting = threading.Lock()


def read_on() -> None:
    """One reader; two of them drive the queue in turn."""
    global good
    while True:
        try:
            same = read(engine, 0, len(data)) == data
        except DeviceError as error:
            failures.append((time.monotonic(), type(error).__name__, str(error)))
            return
        assert same, "other bytes than were written"
        with counting:
            good += 1
            if good == 2:
                print(f"reading {address}", flush=True)


readers = [threading.Thread(target=read_on) for _ in range(2)]
for reader in readers:
    reader.start()
for reader in readers:
    reader.join()

started = time.monotonic()
again = []
for _ in range(3):
    try:
        read(engine, 0, 4096)
        again.append("nothing")
    except DeviceError as error:
        again.append(type(error).__name__)
again_s = time.monotonic() - started
cpu = time.process_time()
time.sleep(2.0)
idle_cpu_s = time.process_time() - cpu
gone = engine.gone
close_s = 0.0
if "keep" not in sys.argv:
    started = time.monotonic()
    engine.close()
    close_s = time.monotonic() - started
tell(
    good=good, failures=failures, again=again, again_s=again_s, idle_cpu_s=idle_cpu_s, gone=gone,
    close_s=close_s,
)  # fmt: skip
os._exit(0)
