"""Readers where nothing can be written: read-only filesystems and folders, and a crash before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import spdk_kv
from spdk_kv.cli import main
from spdk_kv.errors import CorruptionError, DeviceError
from store.helpers import FILE_ENGINES, folder_fixture, open_store, payload, python, version_of
from store.test_readers import SHAPE, open_reader, prompt, same_tokens
from support import blockdev

folder = folder_fixture

# A writer that is killed: its log is left, with commits that the index's file does not have.
KILLED = """
import os, signal, sys
from store.helpers import open_store, payload
from store.test_readers import prompt
store = open_store(sys.argv[1], engine="threads")  # a ring would keep the filesystem busy
store.put("a", payload("a", 1))
store.flush()
store.put_many({str(n): payload(str(n), 1) for n in range(50)})
store.put("a", payload("a", 2))
prompt(store, "s", 30)
store.put("a", payload("a", 3))
os.kill(os.getpid(), signal.SIGKILL)
"""
TESTS = str(Path(__file__).parent.parent)


@contextmanager
def mounted(folder: Path, nbytes: int = 64 << 20) -> Iterator[Path]:
    with blockdev.ext4(folder, nbytes) as place:
        yield place


def make_read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


@pytest.fixture(scope="module")
def left() -> Iterator[dict[str, Path]]:
    """A store as a writer left it that was closed, and one that was killed."""
    with tempfile.TemporaryDirectory(prefix="spdk_kv-test-") as folder:
        closed, killed = Path(folder, "closed"), Path(folder, "killed")
        with open_store(closed) as made:
            made.put_many({str(n): payload(str(n), 1) for n in range(50)})
            made.put("a", payload("a", 2))
            prompt(made, "s", 30)
        ran = subprocess.run([sys.executable, "-c", KILLED, str(killed)], cwd=TESTS, check=False)
        assert ran.returncode == -signal.SIGKILL
        assert (killed / "index.sqlite-wal").stat().st_size > 0
        yield {"closed": closed, "killed": killed}


def check(store: spdk_kv.KVStore) -> None:
    """It has what the killed writer had flushed."""
    assert version_of("a", store.get("a")) == 2
    assert len(store) == 51
    assert store.sequences() == ["s"]
    assert same_tokens(store.sequence("s", SHAPE), 30)


@pytest.mark.parametrize(
    ("how", "engine"),
    [
        *((how, engine) for how in ("closed", "killed") for engine in FILE_ENGINES),
        ("killed, and no shared memory", "uring"),
    ],
)
def test_a_read_only_filesystem(folder, left, how, engine):
    with mounted(folder) as place:
        store = place / "store"
        shutil.copytree(left[how.partition(",")[0]], store)
        if "no shared memory" in how:
            (store / "index.sqlite-shm").unlink()
        make_read_only(place)
        before = {each.name: each.read_bytes() for each in store.iterdir()}
        with open_reader(store, engine=engine) as reader:
            check(reader)
            assert not reader.refresh()
            with pytest.raises(spdk_kv.KeyNotFound):
                reader.get("never")
        with pytest.raises(DeviceError, match="read-only"):
            spdk_kv.open(store, engine=engine)
        with spdk_kv.open(store, engine=engine, create=False) as by_itself:
            assert by_itself.read_only
            check(by_itself)
        with pytest.raises(DeviceError, match="read-only"):
            spdk_kv.open(store, engine=engine, create=False, verify=False)
        shown = CliRunner().invoke(main, ["stat", f"file://{store}", "--json"])
        assert (shown.exit_code, shown.stderr) == (0, "")
        assert (json.loads(shown.stdout)["blobs"], json.loads(shown.stdout)["sequences"]) == (51, 1)
        assert {each.name: each.read_bytes() for each in store.iterdir()} == before


def test_a_read_only_view_of_what_somebody_else_writes(folder):
    with mounted(folder) as place:
        code = KILLED.replace(
            "os.kill(os.getpid(), signal.SIGKILL)", "print(1, flush=True); input()"
        )
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(place / "store")],
            cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"1\n"
            view = folder / "view"
            view.mkdir()
            # As another container has it.
            subprocess.run(["mount", "--bind", str(place), str(view)], check=True)
            try:
                subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)
                with open_reader(view / "store") as reader:
                    check(reader)
                    writer.communicate(b"\n")  # it closes the store
                    assert reader.refresh()
                    assert version_of("a", reader.get("a")) == 3
                    assert same_tokens(reader.sequence("s"), 30)
            finally:
                subprocess.run(["umount", str(view)], check=True)
        finally:
            writer.kill()
            writer.communicate()


def test_a_log_that_is_lost_is_noticed(folder, left):
    store = folder / "store"
    shutil.copytree(left["killed"], store)
    (store / "index.sqlite-wal").unlink()
    with pytest.raises(CorruptionError, match=r"lost \d+ commits"):
        open_reader(store)


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_folder_without_write_permission(folder, left, how):
    """As another user, who may read it and no more."""
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    store = folder / "store"
    shutil.copytree(left[how], store)
    for path in (folder, store):
        path.chmod(0o755)
    for path in store.iterdir():
        path.chmod(0o644)
    code = """
import os, sys
from store.test_readers_mounts import check
from store.test_readers import open_reader
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open(sys.argv[1] + "/lock", "r+")
except PermissionError:
    with open_reader(sys.argv[1]) as reader:
        check(reader)
    print("read", flush=True)
    open_reader(sys.argv[2])
"""
    private = folder / "private"
    with open_store(private):
        private.chmod(0o755)
        (private / "data").chmod(0o644)
    ran = python(code, str(store), str(private), cwd=TESTS)
    assert ran.stdout == "read\n", ran.stderr
    assert "DeviceError: cannot open" in ran.stderr
    assert "namei -l" in ran.stderr


@pytest.mark.parametrize("is_read_only", [True, False])
def test_a_block_device_with_its_index_on_a_read_only_filesystem(folder, is_read_only):
    image = folder / "drive"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    with mounted(folder) as place:
        index = place / "index"
        with (
            blockdev.loop_device(image) as node,
            open_store(f"block://{node}", capacity=None, create=True, index_dir=index) as made,
        ):
            made.put("a", payload("a", 1))
        make_read_only(place)
        options = ["--read-only"] if is_read_only else []
        with blockdev.loop_device(image, *options) as node:
            before = image.read_bytes()
            with open_reader(f"block://{node}", index_dir=index) as reader:
                assert version_of("a", reader.get("a")) == 1
            with spdk_kv.open(f"block://{node}", index_dir=index, create=False) as by_itself:
                assert by_itself.read_only
                assert version_of("a", by_itself.get("a")) == 1
            assert image.read_bytes() == before
