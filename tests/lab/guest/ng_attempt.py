"""Opens the generic node beside a disk for a moment; tells what came of it. argv: the disk."""

import sys

from engine import tell

from spdk_kv.engines import open_engine, parse_location

node = sys.argv[1].replace("/nvme", "/ng")
try:
    open_engine(parse_location(f"ng://{node}")).close()
except Exception as error:
    tell(kind=type(error).__name__, text=str(error))
else:
    tell(kind="opened", text="")
