"""Ownership of a store: one process, one store object, freed however that process ends."""

from __future__ import annotations

import fcntl
import io
import os
import threading
import time
import weakref

from spdk_kv.errors import StoreLocked, file_error

# Commands of a killed process end when the drive is done with them.
_COMMANDS_TIMEOUT_S = 5.0
# An owner writes its PID right after it takes the lock; a rival looks for it this often.
_READ_ATTEMPTS = 5
_READ_INTERVAL_S = 0.01


class StoreLock:
    """The lock file at ``path``: whoever holds it owns the store.

    The kernel frees it when the owner dies, even by kill -9. The file stays behind and is never
    unlinked: a process that had it open would otherwise lock a file that nobody else sees.
    A child after fork does not own it. Safe to use from several threads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        self._file: io.FileIO | None = None

    def acquire(self) -> None:
        """Becomes the owner, without waiting for another one to finish.

        StoreLocked names the owner's PID, which is ours where another store object of this
        process (or this lock) has it already. DeviceError where the file cannot be opened or
        its filesystem has no locks.
        """
        with _fork_guard:
            try:
                file = io.FileIO(self.path, "r+", opener=_open_private)
            except OSError as error:
                raise file_error("open", self.path, error) from error
            try:
                self._lock(file)
                pid = f"{os.getpid()}\n".encode()
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), pid, 0)
            except OSError as error:
                file.close()
                raise file_error("lock", self.path, error) from error
            except BaseException:
                file.close()
                raise
            self._file = file
            _held.add(self)

    def release(self) -> None:
        """Lets the next one own the store. Does nothing where this lock is not held. Where an
        interrupt ended it, another call does the rest."""
        with _fork_guard:
            if self._file is not None and not self._file.closed:
                try:
                    # Had an interrupted call unlocked it already, the next owner's PID would be in
                    # the file.
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Emptied while still locked: the next owner's rivals must not read our PID.
                    os.ftruncate(self._file.fileno(), 0)
                except BlockingIOError:
                    pass
                finally:
                    # Explicit, because a close leaves the lock with other holders of the
                    # descriptor.
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            self._forget()

    def _lock(self, file: io.FileIO) -> None:
        # Until the owner has written its PID, what is read is empty or a dead predecessor's: read
        # again before naming it.
        for attempt in range(_READ_ATTEMPTS):
            if attempt:
                time.sleep(_READ_INTERVAL_S)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pid = _read_pid(file)
            if pid is not None and _is_alive(pid):
                break
        owner = "another process" if pid is None else f"process {pid}"
        if pid == os.getpid():
            owner += " (this one, through another store object)"
        raise StoreLocked(f"the store is in use by {owner}: {self.path} is locked", pid=pid)

    def _forget(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        _held.discard(self)


def owner_of(path: str | os.PathLike[str]) -> int | None:
    """The PID of the living process that holds the lock file at ``path``, or None. Reads the file
    and takes no lock, so that nobody is refused because of it."""
    try:
        with io.FileIO(os.fspath(path)) as file:
            pid = _read_pid(file)
    except OSError:
        return None
    return pid if pid is not None and _is_alive(pid) else None


class CommandsLock:
    """A lock on the data file, through the open file that the commands use (``fd``).

    When a process is killed, its lock file is free at once, but what its ring had in flight may
    reach the file later, in extents that are ours by then. The kernel keeps an open file, and so
    its lock, until the last command that uses it has ended. The constructor waits for that, and
    raises StoreLocked after 5 s.
    """

    def __init__(self, fd: int, path: str) -> None:
        # The same open file, still open when the engine has closed its own descriptor.
        try:
            self._fd = os.dup(fd)
        except OSError as error:
            raise file_error("lock", path, error) from error
        until = time.monotonic() + _COMMANDS_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    os.close(self._fd)
                    raise StoreLocked(
                        f"{path} is still in use: by commands of a process that was killed, by "
                        "one that it had forked, or by a store that has its index elsewhere"
                    ) from None
            except OSError as error:
                os.close(self._fd)
                raise file_error("lock", path, error) from error
            time.sleep(_READ_INTERVAL_S)

    def release(self) -> None:
        """Gives the lock up; no command may be in flight. Mappings of the file may outlive this.
        May be called twice."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            fd, self._fd = self._fd, -1
            os.close(fd)


def _open_private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_size == 0:
        os.fchmod(descriptor, 0o600)  # the umask may have taken the owner's bits
    return descriptor


def _read_pid(file: io.FileIO) -> int | None:
    text = os.pread(file.fileno(), 32, 0).strip()
    return int(text) if text.isdigit() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True


# flock belongs to the open file, which fork shares: a child that kept its descriptor would keep
# the store locked after the parent is gone. So the child closes it at once, and no fork happens
# while a lock is changing hands. (Closing does not unlock: the parent still has it open.)
_fork_guard = threading.RLock()
_held: weakref.WeakSet[StoreLock] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    try:
        for lock in list(_held):
            lock._forget()
    finally:
        _fork_guard.release()


os.register_at_fork(
    before=_fork_guard.acquire,
    after_in_parent=_fork_guard.release,
    after_in_child=_after_fork_in_child,
)
