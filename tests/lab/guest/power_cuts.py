"""A store under power cuts: works on a drive whose writes are recorded, then opens what the drive
could hold at many moments of that.

argv: the drive's serial, the log, how many cuts. The drive's namespaces: 1 the store (through
`ng`), 2 a file system for its index, 3 notes of what was flushed by then. All are in one log, so
that its order is that of the whole. Only namespace 1 has a volatile cache here: the file system is
mounted without barriers, so every flush in the log is the store's own.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import numpy as np  # noqa: E402
from drive import controller_of, wait_for  # noqa: E402
from engine import tell  # noqa: E402
from power_log import Replay, read_log  # noqa: E402

from spdk_kv.errors import KeyNotFound, StoreMismatch  # noqa: E402
from store.helpers import check_books, open_store, payload, version_of  # noqa: E402

BLOCK = 4096
PLACE = Path("/run/power")
ROUNDS, KEYS = 8, 6
serial, log, cuts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
controller = wait_for(lambda: controller_of(serial))
name = wait_for(lambda: [ng.name for ng in controller.glob("nvme*n1")])[0].removesuffix("1")
store_node, index_node, note_node = (f"/dev/{name}{number}" for number in (1, 2, 3))
sizes = [
    int(Path(f"/sys/class/block/{name}{number}/size").read_text()) * 512 for number in (1, 2, 3)
]
starts = [0, sizes[0], sizes[0] + sizes[1]]
options = {"capacity": None, "index_dir": PLACE / "index"}
uri = f"ng:///dev/{name.replace('nvme', 'ng')}1"
random = np.random.default_rng(7)


def mount() -> None:
    subprocess.run(["mount", "-o", "nobarrier", index_node, str(PLACE)], check=True)


def unmount() -> None:
    subprocess.run(["umount", str(PLACE)], check=True)


def note(state: dict) -> None:
    """Into the log, by a write past the page cache, and without a flush."""
    with mmap.mmap(-1, BLOCK) as room:
        room.write(json.dumps(state).encode())
        fd = os.open(note_node, os.O_WRONLY | os.O_DIRECT)
        assert os.pwritev(fd, [room], 0) == BLOCK
        os.close(fd)


def work() -> list[tuple[str, int | None]]:
    """Puts, replaces and deletes, with notes of how much of the history was flushed. The history:
    (key, version, or None for a delete)."""
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0",
                    index_node], check=True)  # fmt: skip
    PLACE.mkdir()
    mount()
    history: list[tuple[str, int | None]] = []
    with open_store(uri, create=True, **options) as store:
        for version in range(1, ROUNDS + 1):
            for number in random.permutation(KEYS):
                key = f"key-{number}"
                if version > 1 and random.random() < 0.15:
                    store.delete(key)
                    history.append((key, None))
                    continue
                nbytes = int(random.choice([5000, 40_000, 200_000]))
                store.put(key, payload(key, version, nbytes))
                history.append((key, version))
            if version % 3:
                store.flush()
                note({"flushed": len(history)})
    note({"flushed": len(history)})
    unmount()
    return history


def write_image(image: np.ndarray) -> None:
    """Makes the drive hold ``image``; only what differs is written, for all of it is recorded."""
    for node, start, nbytes in zip((store_node, index_node), starts, sizes, strict=False):
        fd = os.open(node, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, nbytes) as room:
            assert os.preadv(fd, [room], 0) == nbytes
            there = np.frombuffer(room, np.uint8).reshape(-1, BLOCK)
            wanted = image[start : start + nbytes].reshape(-1, BLOCK)
            for block in np.flatnonzero((there != wanted).any(axis=1)):
                there[block] = wanted[block]
                at = int(block) * BLOCK
                assert os.pwritev(fd, [memoryview(room)[at : at + BLOCK]], at) == BLOCK
            del there
        os.close(fd)


def acceptable(key: str, flushed: int, later: int, history: list) -> set[int | None]:
    """The versions of ``key`` that may be found when ``flushed`` of the history is on the medium
    and nothing after ``later`` was begun."""
    versions: list[int | None] = [None]
    versions += [version for name, version in history[:flushed] if name == key]
    return {versions[-1], *(v for name, v in history[flushed:later] if name == key)}


def look(flushed: int, later: int, history: list) -> dict:
    """Opens the store as a boot after the cut would."""
    mount()
    try:
        try:
            store = open_store(uri, **options)
        except StoreMismatch:
            assert not flushed, "a store that was flushed cannot be opened"
            return {"begun": False, "found": 0}
        with store:
            check_books(store)
            found = 0
            for number in range(KEYS):
                key = f"key-{number}"
                try:
                    version = version_of(key, store.get(key, as_numpy=True))
                except KeyNotFound:
                    version = None
                wanted = acceptable(key, flushed, later, history)
                assert version in wanted, f"{key}: version {version}, not one of {wanted}"
                found += version is not None
        return {"begun": True, "found": found}
    finally:
        unmount()


history = work()
entries = list(read_log(log))
notes = [
    (number + 1, json.loads(entry.data[: entry.data.index(b"\0")])["flushed"])
    for number, entry in enumerate(entries)
    if entry.offset == starts[2] and entry.data[:1] == b"{"
]
# Not while the file system is being made: the first write of the store's is where it starts.
first = next(n for n, e in enumerate(entries) if e.offset < sizes[0] and e.data.strip(b"\0"))
replay = Replay(entries, sum(sizes), sizes[0])
begun = unflushed = 0
for number, cut in enumerate(sorted(random.integers(first, len(entries), cuts).tolist())):
    flushed = max((count for at, count in notes if at <= cut), default=0)
    later = min((count for at, count in notes if at > cut), default=len(history))
    write_image(replay.image(cut, random if number % 2 else None))
    unflushed += cut - replay.flushed_before(cut)
    try:
        begun += look(flushed, later, history)["begun"]
    except Exception as failure:
        raise AssertionError(f"cut {number}, after {cut} of {len(entries)} requests") from failure
tell(entries=len(entries), flushes=sum(e.flush for e in entries), notes=len(notes),
     begun=begun, cuts=cuts, unflushed=unflushed)  # fmt: skip
