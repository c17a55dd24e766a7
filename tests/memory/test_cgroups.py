"""The reader in a real memory cgroup whose limits change under it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdk_kv.devices.mounts import read_mounts
from spdk_kv.memory.available import MemoryReader
from spdk_kv.units import MIB
from support.waiting import PATIENCE_S

# What the kernel reclaims, and when, depends on what else runs.
pytestmark = pytest.mark.machine
# A process that does one thing for each line it is given, and answers in one line.
CHILD = """
import json, os, sys
from spdk_kv.memory.available import MemoryReader, cached_nbytes
from spdk_kv.units import MIB
reader = MemoryReader()
held, maps = [], []
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "hold":
        held.append(b"x" * (int(words[0]) * MIB))
    if verb == "free":
        held.clear()
    if verb == "read":
        fd = os.open(words[0], os.O_RDONLY)
        for place in range(0, os.fstat(fd).st_size, MIB):
            os.pread(fd, MIB, place)
        maps.append(fd)
    seen = reader.read()
    cached = [cached_nbytes(fd, 0, os.fstat(fd).st_size) for fd in maps]
    print(json.dumps([seen.nbytes, seen.limited_by, seen.notes, sum(cached)]), flush=True)
"""


class Child:
    """A process in a cgroup of its own; `cgroup` is its directory."""

    def __init__(self, cgroup: Path) -> None:
        self.cgroup = cgroup
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"', "sh",
             str(cgroup), sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tell(self, line: str = "look") -> tuple[int, str, list[str], int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        nbytes, limited_by, notes, cached = json.loads(self.process.stdout.readline())
        return nbytes, limited_by, notes, cached


def memory_mount() -> Path:
    for mount in read_mounts():
        if mount.fstype == "cgroup" and "memory" in mount.options:
            return Path(mount.mount_point)
    pytest.skip("no memory controller of cgroup v1 is mounted; v2 is tested with fake trees")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A directory in cgroup v1's memory hierarchy, with one inside it."""
    outer = memory_mount() / f"spdk-kv-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        outer.mkdir()
    except OSError as refused:
        pytest.skip(f"may not make a memory cgroup here: {refused}")
    try:
        # Else the inner one's usage does not count in the outer one.
        with contextlib.suppress(OSError):
            (outer / "memory.use_hierarchy").write_text("1")
        inner.mkdir()
        yield inner
    finally:
        for folder in (inner, outer):
            for _ in range(100):  # a process that has just ended still counts for a moment
                try:
                    if folder.exists():
                        folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)


@pytest.fixture
def child(cgroup: Path) -> Iterator[Child]:
    set_limit(cgroup, 512)
    running = Child(cgroup)
    try:
        yield running
    finally:
        assert running.process.stdin is not None
        running.process.stdin.close()
        running.process.wait(PATIENCE_S)
        assert running.process.stdout is not None
        running.process.stdout.close()


def set_limit(cgroup: Path, mib: int) -> None:
    (cgroup / "memory.limit_in_bytes").write_text(str(mib * MIB if mib >= 0 else -1))


def mib(answer: tuple[int, str, list[str], int]) -> float:
    return answer[0] / MIB


def test_limits_that_change_under_a_running_process(child: Child) -> None:
    inner, outer = str(child.cgroup), str(child.cgroup.parent)
    first = child.tell()
    assert first[1:3] == (inner, [])
    assert 400 < mib(first) < 512
    taken = 512 - mib(first)  # the interpreter's own
    for limit in (256, 1024, 128):
        set_limit(child.cgroup, limit)
        assert mib(child.tell()) == pytest.approx(limit - taken, abs=8)
        assert child.tell()[1] == inner
    set_limit(child.cgroup, 1024)
    set_limit(child.cgroup.parent, 300)
    assert mib(child.tell()) == pytest.approx(300 - taken, abs=8)
    assert child.tell()[1] == outer
    set_limit(child.cgroup, -1)
    assert child.tell()[1] == outer
    set_limit(child.cgroup.parent, -1)
    assert child.tell()[1:3] == ("MemAvailable", [])


def test_memory_in_use_is_no_room_and_page_cache_is(child: Child, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as out:
        out.write(b"x" * (128 * MIB))
        out.flush()
        os.fsync(out.fileno())
        # Dropped, so that the child's read charges it to the child's cgroup.
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # Loosely: the kernel counts in batches per CPU, and writes out what is dropped when it likes.
    before = mib(child.tell())
    assert mib(child.tell("hold 100")) == pytest.approx(before - 100, abs=24)
    after = child.tell(f"read {file}")
    assert mib(after) == pytest.approx(before - 100, abs=24)
    assert 104 * MIB <= after[3] <= 128 * MIB
    # The kernel takes page cache back when the limit falls, and the budget says so.
    set_limit(child.cgroup, 180)
    squeezed = child.tell()
    assert mib(squeezed) == pytest.approx(180 - (512 - before) - 100, abs=24)
    assert squeezed[3] <= squeezed[0] + 24 * MIB
    assert mib(child.tell("free")) == pytest.approx(180 - (512 - before), abs=24)


def test_process_that_is_moved_to_another_cgroup(child: Child) -> None:
    assert child.tell()[1] == str(child.cgroup)
    pid = str(child.process.pid)
    (child.cgroup.parent / "cgroup.procs").write_text(pid)
    set_limit(child.cgroup.parent, 200)
    child.cgroup.rmdir()  # gone for good
    moved = child.tell()
    assert moved[1:3] == (str(child.cgroup.parent), [])
    assert mib(moved) <= 200
    (memory_mount() / "cgroup.procs").write_text(pid)
    assert child.tell()[1:3] == ("MemAvailable", [])


def test_reader_taken_through_a_fork_sees_the_child(cgroup: Path) -> None:
    set_limit(cgroup, 64)
    reader = MemoryReader()
    for _ in range(2):  # the second leaves the parent's /proc/self open
        assert reader.read().limited_by != str(cgroup)
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            status = 0 if reader.read().limited_by == str(cgroup) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert reader.read().limited_by != str(cgroup)
