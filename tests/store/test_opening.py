"""Opening where it cannot be: what the user reads names the file, the cause and a remedy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spdk_kv
from spdk_kv import DeviceError, SpdkKvError, StoreMismatch
from store.helpers import open_store
from support.subprocesses import run_script


def a_file(folder: Path) -> Path:
    (folder / "taken").touch()
    return folder / "taken"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "kv"


def a_dangling_link(folder: Path) -> Path:
    (folder / "link").symlink_to("nowhere")
    return folder / "link"


def a_circle(folder: Path) -> Path:
    (folder / "circle").symlink_to("circle")
    return folder / "circle" / "kv"


def a_folder_for_a_lock(folder: Path) -> Path:
    (folder / "kv" / "lock").mkdir(parents=True)
    return folder / "kv"


def a_name_too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_file, "taken is not a folder"),
        (below_a_file, "taken is not a folder"),
        (a_dangling_link, "is a symbolic link to nowhere, which does not exist"),
        (a_circle, "circle is not a folder"),
        (a_folder_for_a_lock, "cannot open .*lock: Is a directory"),
        (a_name_too_long, "choose a shorter one"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    place = make(tmp_path)
    with pytest.raises(DeviceError, match=words) as refused:
        spdk_kv.open(place)
    assert "offset" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("uri", ["block:///dev/nvme77n1", "ng:///dev/ng77n1"])
def test_a_node_that_is_missing_is_named(tmp_path: Path, uri: str) -> None:
    with pytest.raises(DeviceError, match=r"cannot open /dev/n\w+77n1: .*; .*lsblk"):
        spdk_kv.open(uri, index_dir=tmp_path / "index", create=True)


def test_too_many_open_files_is_said_wherever_they_run_out(tmp_path: Path) -> None:
    # Each number of descriptors that are left makes another of the calls fail that opening makes:
    # for the lock, the index (SQLite says "unable to open database file"), the ring, the data.
    printed = run_script(f"""
        import logging, os, resource
        import spdk_kv.store
        logging.disable(logging.CRITICAL)
        folder, spare = {str(tmp_path)!r}, []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        while True:
            try:
                spare.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for made in (False, True):
            if made:
                for _ in range(20):
                    os.close(spare.pop())
                spdk_kv.open(f"{{folder}}/made", capacity="1 MiB").close()
                while len(spare) < before:
                    spare.append(os.open(os.devnull, os.O_RDONLY))
            before = len(spare)
            for left in range(16):
                place = f"{{folder}}/made" if made else f"{{folder}}/new-{{left}}"
                try:
                    spdk_kv.open(place, capacity="1 MiB").close()
                    print("opened")
                except spdk_kv.SpdkKvError as error:
                    print(left, error)
                os.close(spare.pop())
            while len(spare) < before:
                spare.append(os.open(os.devnull, os.O_RDONLY))
    """)
    lines = printed.splitlines()
    assert len(lines) == 32
    refused = [line for line in lines if line != "opened"]
    assert len(refused) > 10
    for line in refused:
        assert "too many files open: raise its limit (`ulimit -n`" in line, line
        assert str(tmp_path) in line


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"a%41b", b"a?b#c", b"a\nb"])
def test_any_folder_name_works_and_is_found_again(tmp_path: Path, name: bytes) -> None:
    folder = os.fsencode(tmp_path) + b"/" + name
    for location in (os.fsdecode(folder), Path(os.fsdecode(folder)), folder):
        with spdk_kv.open(location, capacity="1 MiB") as store:
            store.put("k", torch.arange(3))
            uri = store.location
        uri.encode()  # printable anywhere
        with spdk_kv.open(uri, create=False) as store:
            assert store.get("k").tolist() == [0, 1, 2]
    assert os.listdir(os.fsencode(tmp_path)) == [name]


def test_a_relative_path_object_is_a_folder_below_the_working_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with spdk_kv.open(Path("caches/kv"), capacity="1 MiB") as store:
        assert store.location == f"file://{tmp_path}/caches/kv"
    assert (tmp_path / "caches/kv/data").exists()


def test_the_data_of_an_index_that_is_gone_says_what_to_remove(tmp_path: Path) -> None:
    with open_store(tmp_path / "kv") as store:
        store.put("k", torch.ones(3))
    if not (tmp_path / "kv/data").exists():
        pytest.skip("the data is on a drive of its own")
    (tmp_path / "kv/data").unlink()
    with pytest.raises(StoreMismatch, match=r"remove \S+/kv/index\.sqlite\*"):
        open_store(tmp_path / "kv")


def test_an_index_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    open_store(tmp_path / "kv").close()
    index = next(tmp_path.rglob("index.sqlite"))
    index.with_name("index.sqlite-wal").mkdir()
    with pytest.raises(SpdkKvError, match=r"index\.sqlite"):
        open_store(tmp_path / "kv")
