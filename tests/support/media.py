"""The media that the engine tests run on: files, loop devices, partitions, memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.testing import SMALL, Medium
from support import blockdev

NBYTES = 8 << 20

FILES = [f"{engine}-file" for engine in ("uring", "threads", "pagecache")]
BLOCKS = ["uring-loop", "uring-partition", "threads-loop", "pagecache-loop"]
KEEPING = [*FILES, *BLOCKS, "ram"]
EVERY = [*KEEPING, "null"]


def image(folder: Path, nbytes: int = NBYTES) -> Path:
    """A preallocated file."""
    path = folder / "medium.img"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    return path


@contextlib.contextmanager
def medium(kind: str, folder: Path, options: QueueOptions = SMALL) -> Iterator[Medium]:
    """``kind``: an engine's name, and after a dash what it stands on."""
    name, _, on = kind.partition("-")
    with contextlib.ExitStack() as stack:
        path = ""
        settings: dict[str, Any] = {"options": options}
        if on == "":
            location = parse_location(f"{name}://")
            settings["capacity_nbytes"] = NBYTES
        elif on == "file":
            path = str(image(folder))
            location = parse_location(f"file://{folder}")
        elif on == "loop":
            path = stack.enter_context(blockdev.loop_device(image(folder)))
            location = parse_location(f"block://{path}")
        else:
            path = stack.enter_context(blockdev.partition(image(folder, NBYTES + (1 << 20))))
            location = parse_location(f"block://{path}")
        engine = open_engine(location, path, engine=name, **settings)
        stack.callback(engine.close)
        yield Medium(engine, path)
