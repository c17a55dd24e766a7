"""What the errors of files and commands say: what was tried, on what, why, and what helps."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spdk_kv.errors import (
    CapacityError,
    DeviceError,
    DeviceGone,
    DeviceTimeout,
    device_error,
    file_error,
)

# What the system may say of a file or folder, and what has to be named then.
REMEDIES = {
    errno.EACCES: "namei -l",
    errno.EROFS: "remount",
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "fs.file-max",
    errno.ENAMETOOLONG: "shorter",
    errno.ELOOP: "symbolic links",
    errno.EISDIR: "is a folder",
    errno.ENOLCK: "no file locks",
    errno.EIO: "dmesg",
    errno.ENOSPC: "df -i",
    errno.EDQUOT: "quota",
}


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", REMEDIES)
def test_a_files_error_names_it_and_a_remedy_and_no_offset(number: int) -> None:
    error = file_error("open", "/srv/kv/lock", refused(number))
    text = str(error)
    assert text.startswith(f"cannot open /srv/kv/lock: {os.strerror(number)} (")
    assert REMEDIES[number] in text
    assert "offset" not in text
    assert "bytes" not in text
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert type(error) is (CapacityError if full else DeviceError)
    if isinstance(error, DeviceError):
        found = (error.op, error.offset, error.nbytes, error.status)
        assert found == ("open", None, None, number)


def test_a_files_error_without_a_remedy_is_whole_all_the_same() -> None:
    assert str(file_error("lock", "/x", refused(errno.EDOM))).endswith(f"{os.strerror(33)} (EDOM)")


@pytest.mark.parametrize("number", [errno.ENXIO, errno.ENODEV])
def test_a_node_without_a_drive_is_a_drive_that_is_gone(number: int) -> None:
    error = file_error("open", "/dev/nvme7n1", refused(number))
    assert isinstance(error, DeviceGone)
    assert "bring it back" in str(error)


def test_the_part_of_the_path_that_is_missing_is_named(tmp_path: Path) -> None:
    text = str(file_error("open", f"{tmp_path}/a/b/lock", refused(errno.ENOENT)))
    assert f"there is no {tmp_path}/a:" in text
    (tmp_path / "link").symlink_to("nowhere")
    text = str(file_error("open", f"{tmp_path}/link/lock", refused(errno.ENOENT)))
    assert f"{tmp_path}/link is a symbolic link to nowhere, which does not exist" in text
    text = str(file_error("open", "/dev/nvme7n1", refused(errno.ENOENT)))
    assert "lsblk" in text


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EEXIST])
def test_the_file_where_a_folder_should_be_is_named(tmp_path: Path, number: int) -> None:
    (tmp_path / "taken").touch()
    text = str(file_error("create the folder", f"{tmp_path}/taken/deeper/kv", refused(number)))
    assert f"{tmp_path}/taken is not a folder" in text


def test_a_commands_error_names_its_range_and_a_flush_has_none() -> None:
    read = device_error("read", 4096, 8192, errno.EIO, "/dev/nvme0n1")
    assert str(read).startswith("read of 8192 bytes at offset 4096 of /dev/nvme0n1 failed: EIO")
    assert isinstance(read, DeviceError)
    assert (read.op, read.offset, read.nbytes, read.status) == ("read", 4096, 8192, errno.EIO)
    flush = str(device_error("flush", 0, 0, errno.EIO, "/srv/kv/data"))
    assert flush.startswith("flush of /srv/kv/data failed: EIO")
    assert isinstance(device_error("read", 0, 1, errno.ETIMEDOUT), DeviceTimeout)
