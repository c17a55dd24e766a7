"""Files and block devices opened to be read only: beside whoever writes, and nothing changes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from spdk_kv.engines import FileEngine, SharedPageCacheEngine, open_engine, parse_location
from spdk_kv.errors import DeviceError, EngineUnavailable
from spdk_kv.testing import read, write
from support import blockdev

ENGINES = ("uring", "threads", "pagecache")
BLOCK = bytes(range(256)) * 16


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator:
    with ExitStack() as undo:

        def open_(path: Path | str, engine: str | None, read_only: bool) -> FileEngine:
            opened = open_engine(
                parse_location(tmp_path), str(path), engine=engine, read_only=read_only
            )
            undo.callback(opened.close)
            assert isinstance(opened, FileEngine)
            return opened

        yield open_


@pytest.mark.parametrize("engine", [*ENGINES, None])
def test_a_reader_has_what_a_writer_writes_and_writes_nothing(open_file, tmp_path, engine):
    path = tmp_path / "data"
    writer = open_file(path, engine, False)
    write(writer, 0, BLOCK)
    path.chmod(0o400)
    reader = open_file(path, engine, True)
    assert reader.read_only
    assert not writer.read_only
    assert read(reader, 0, 4096) == BLOCK
    write(writer, 0, BLOCK[::-1])
    assert read(reader, 0, 4096) == BLOCK[::-1]
    with pytest.raises(DeviceError) as failed:
        write(reader, 0, BLOCK)
    assert failed.value.status == errno.EBADF
    assert read(reader, 0, 4096) == BLOCK[::-1]
    shared = SharedPageCacheEngine(str(path), reader.options, True)
    assert read(shared, 0, 4096) == BLOCK[::-1]
    shared.drop(0, 4096)
    shared.close()


@pytest.mark.parametrize("engine", [*ENGINES, None])
def test_a_missing_file_is_not_made(open_file, tmp_path, engine):
    with pytest.raises(DeviceError, match="there is no"):
        open_file(tmp_path / "data", engine, True)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_device_is_read_beside_its_exclusive_holder(open_file, tmp_path, engine):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with blockdev.loop_device(image) as node:
        writer = open_file(node, engine, False)
        write(writer, 4096, BLOCK)
        reader = open_file(node, engine, True)
        assert read(reader, 4096, 4096) == BLOCK
        assert reader.geometry == writer.geometry
        writer.close()
        reader.close()


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("ram://", ValueError, "its own process's alone"),
        ("null://", ValueError, "its own process's alone"),
        ("ng:///dev/ng0n1", EngineUnavailable, r"engine ng .*one process at a time.*file://"),
        ("spdk://0000:01:00.0/1", EngineUnavailable, r"engine spdk .*one process at a time"),
        ("spdk+tcp://h:1/nqn.x:y/1", EngineUnavailable, "one process at a time"),
        ("spdk+vfiouser:///tmp/nqn.x:y/1", EngineUnavailable, "one process at a time"),
    ],
)
def test_what_one_process_has_alone_is_not_read_beside_it(uri, error, says):
    with pytest.raises(error, match=says):
        open_engine(parse_location(uri), capacity_nbytes=1 << 20, read_only=True)
