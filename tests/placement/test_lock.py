"""Who owns a store, and what frees it: with real processes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from spdk_kv.errors import DeviceError, StoreLocked
from spdk_kv.placement import lock as lock_module
from spdk_kv.placement.lock import CommandsLock, StoreLock
from support.interrupts import interrupted_everywhere

OWNER = """
import sys, time
from spdk_kv.placement.lock import StoreLock
lock = StoreLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""

FORKING_OWNER = """
import os, sys, time
from spdk_kv.placement.lock import StoreLock
lock = StoreLock(sys.argv[1])
lock.acquire()
child = os.fork()
if child == 0:
    lock.release()  # not the child's to give back
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""

# A thread of a forked child takes the lock; prints the child's status, which is 0 if it could.
FORKED_THREAD = """
import os, sys, threading
from spdk_kv.placement.lock import StoreLock
lock = StoreLock(sys.argv[1])
child = os.fork()
if child == 0:
    taker = threading.Thread(target=lock.acquire, daemon=True)
    taker.start()
    taker.join(120)
    os._exit(taker.is_alive())
print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def start(program: str, path: Path) -> tuple[subprocess.Popen[str], str]:
    """A process running ``program`` on ``path``, and the first line that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.fixture
def owner(path: Path) -> Iterator[subprocess.Popen[str]]:
    process, line = start(OWNER, path)
    assert line == "held\n"
    with process:
        yield process
        process.kill()


def test_another_process_is_refused_and_told_the_owners_pid(
    path: Path, owner: subprocess.Popen[str]
) -> None:
    lock = StoreLock(path)
    with pytest.raises(StoreLocked, match=f"process {owner.pid}") as caught:
        lock.acquire()
    assert caught.value.pid == owner.pid
    with pytest.raises(StoreLocked):
        lock.acquire()


def test_kill_9_frees_the_lock(path: Path, owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait()
    lock = StoreLock(path)
    lock.acquire()
    with pytest.raises(StoreLocked) as caught:
        StoreLock(path).acquire()
    assert caught.value.pid == os.getpid()  # not the PID that the dead owner left
    lock.release()


def test_a_second_lock_of_the_same_process_is_refused(path: Path) -> None:
    lock = StoreLock(path)
    lock.acquire()
    for rival in (StoreLock(path), lock):
        with pytest.raises(StoreLocked, match="this one") as caught:
            rival.acquire()
        assert caught.value.pid == os.getpid()
    lock.release()


def test_release_frees_the_lock_keeps_the_file_and_may_be_repeated(path: Path) -> None:
    first = StoreLock(path)
    first.release()
    first.acquire()
    inode = path.stat().st_ino
    first.release()
    second = StoreLock(path)
    second.acquire()
    first.release()  # must not free the second one's
    with pytest.raises(StoreLocked):
        first.acquire()
    assert path.stat().st_ino == inode
    second.release()


def test_a_forked_child_neither_frees_the_lock_nor_outlives_it(path: Path) -> None:
    process, line = start(FORKING_OWNER, path)
    child = int(line)
    try:
        with pytest.raises(StoreLocked) as caught:
            StoreLock(path).acquire()
        assert caught.value.pid == process.pid
        process.kill()
        process.wait()
        os.kill(child, 0)  # the child still lives
        lock = StoreLock(path)
        lock.acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_any_thread_of_a_forked_child_may_own_a_store(path: Path) -> None:
    process, line = start(FORKED_THREAD, path)
    with process:
        assert line == "0\n"


def test_a_program_that_the_owner_starts_does_not_inherit_the_lock(path: Path) -> None:
    lock = StoreLock(path)
    lock.acquire()
    listing = subprocess.run(
        ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
    ).stdout
    assert "/dev/null" in listing or "pipe:" in listing  # it does list what it inherited
    assert str(path) not in listing
    lock.release()


def test_a_dead_predecessors_pid_is_not_taken_for_the_owners(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    with path.open("w+") as file:
        # An owner between taking the lock and writing its PID.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(dead.pid))
        file.flush()
        ours = f"{os.getpid():<20}".encode()
        # It comes to that between two looks, however busy the machine is.
        sleeps = SimpleNamespace(sleep=lambda _: os.pwrite(file.fileno(), ours, 0))
        monkeypatch.setattr(lock_module, "time", sleeps)
        with pytest.raises(StoreLocked) as caught:
            StoreLock(path).acquire()
    assert caught.value.pid == os.getpid()


def test_a_dead_process_owns_nothing(path: Path) -> None:
    assert lock_module.owner_of(path) is None
    with subprocess.Popen(["true"]) as dead:
        pass
    path.write_text(f"{dead.pid}\n")
    assert lock_module.owner_of(path) is None
    path.write_text("nonsense")
    assert lock_module.owner_of(path) is None


def test_the_lock_of_commands_is_given_up_with_its_descriptor(path: Path) -> None:
    path.write_bytes(b"")
    with path.open("r+b") as data, path.open("r+b") as other:
        before = os.listdir("/proc/self/fd")
        lock = CommandsLock(data.fileno(), str(path))
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.release()
        lock.release()
        assert os.listdir("/proc/self/fd") == before
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_the_lock_file_is_private_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        lock = StoreLock(path)
        lock.acquire()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    lock.release()


def test_an_owner_that_left_no_pid_is_reported_as_unknown(
    path: Path, owner: subprocess.Popen[str]
) -> None:
    path.write_bytes(b"")
    with pytest.raises(StoreLocked, match="another process") as caught:
        StoreLock(path).acquire()
    assert caught.value.pid is None


def test_a_folder_that_is_missing_is_a_device_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="missing/lock"):
        StoreLock(tmp_path / "missing" / "lock").acquire()


def test_a_release_that_was_interrupted_is_finished_by_another_one(path: Path) -> None:
    ours: list[StoreLock] = []

    def prepare(at: int) -> None:
        ours[:] = [StoreLock(path)]
        ours[0].acquire()

    def check(at: int) -> None:
        rival = StoreLock(path)
        try:
            rival.acquire()  # as another process may, once it was given up
        except StoreLocked:
            ours[0].release()
            rival.acquire()
        else:
            ours[0].release()
            assert lock_module.owner_of(path) == os.getpid()
        rival.release()
        assert lock_module.owner_of(path) is None

    assert interrupted_everywhere(prepare, lambda at: ours[0].release(), check) > 5
