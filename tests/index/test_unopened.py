"""Why SQLite could not open a file, found by other means and without touching its locks."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from spdk_kv.errors import DeviceError
from spdk_kv.index.database import Index
from spdk_kv.index.unopened import why_unopened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "index.sqlite"
    Index(file).close()
    return file


def number_of(refused: OSError | None) -> int | None:
    return None if refused is None else refused.errno


def test_an_index_that_can_be_opened_has_no_reason(path: Path) -> None:
    assert why_unopened(str(path)) is None


def test_a_missing_file_and_a_missing_folder(path: Path) -> None:
    assert number_of(why_unopened(f"{path}.other")) == errno.ENOENT
    assert number_of(why_unopened(f"{path}/below")) == errno.ENOTDIR


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_somebody_else(path: Path) -> None:
    os.seteuid(65534)
    try:
        found = why_unopened(str(path))
    finally:
        os.seteuid(0)
    assert number_of(found) == errno.EACCES


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Leaves this process as few descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare: list[int] = []
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + count + 1, before[1]))
    try:
        with suppress(OSError):
            while True:
                spare.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(spare.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in spare:
            os.close(descriptor)


def test_too_few_descriptors_are_noticed_before_the_last_is_gone(path: Path) -> None:
    with descriptors_left(3):
        assert number_of(why_unopened(str(path))) == errno.EMFILE
        with pytest.raises(DeviceError, match="ulimit -n"):
            Index(path)
    Index(path).close()


def test_asking_leaves_the_locks_of_an_open_index_alone(path: Path) -> None:
    def locks() -> list[str]:
        held = Path("/proc/locks").read_text().splitlines()
        return [line for line in held if f" {os.getpid()} " in line and "POSIX" in line]

    with closing(Index(path)):
        before = locks()
        assert before
        assert why_unopened(str(path)) is None
        assert locks() == before
