"""`spdk-kv stat`: what it tells of a store, and that it leaves everything as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spdk_kv.cli import main
from spdk_kv.store import open as open_store
from spdk_kv.types import KVShape

MIB = 1 << 20

KEYS = {
    *("location", "uuid", "engine", "direct", "capacity_nbytes", "used_nbytes", "free_nbytes"),
    *("largest_free_nbytes", "blobs", "sequences", "superblock", "health"),
}


def stat(*words: str) -> Result:
    return CliRunner().invoke(main, ["stat", *words])


def report(*words: str) -> dict[str, Any]:
    result = stat(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def store_uri(tmp_path: Path) -> str:
    """A store of 16 MiB with three blobs and one sequence."""
    uri = f"file://{tmp_path / 'store'}"
    with open_store(uri, capacity="16 MiB") as store:
        for name in "abc":
            store.put(name, np.full(1000, ord(name), dtype=np.float32))
        shape = KVShape(layers=2, kv_heads=1, head_dim=64, dtype="float32", max_tokens=16)
        store.sequence("request-1", shape)
    return uri


def test_tells_what_a_store_holds(store_uri: str) -> None:
    found = report(store_uri)
    assert set(found) == KEYS
    assert found["location"] == store_uri
    assert (found["blobs"], found["sequences"]) == (3, 1)
    assert found["capacity_nbytes"] == 16 * MIB
    # Three blobs of one block each, and four units of at least 16 tokens x 64 elements x 4 bytes.
    assert found["used_nbytes"] >= 3 * 4096 + 4 * 4096
    with open_store(store_uri, create=False) as store:
        held = store.stats()
    assert all(found[name] == held[name] for name in KEYS & set(held))
    assert found["used_nbytes"] + found["free_nbytes"] == found["capacity_nbytes"]
    assert 0 < found["largest_free_nbytes"] <= found["free_nbytes"]
    superblock = found["superblock"]
    assert set(superblock) == {"uuid", "generation", "block_nbytes", "capacity_nbytes"}
    assert superblock["uuid"] == found["uuid"]
    assert superblock["capacity_nbytes"] == 16 * MIB


def test_changes_nothing(store_uri: str) -> None:
    folder = Path(store_uri.removeprefix("file://"))
    before = {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in folder.iterdir()}
    assert report(store_uri) == report(store_uri)
    after = {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in folder.iterdir()}
    assert after == before
    with open_store(store_uri, create=False) as store:
        assert store.keys() == ["a", "b", "c"]
        assert store.get("b", as_numpy=True)[0] == ord("b")


def test_plain_lines_in_a_pipe(store_uri: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "spdk_kv", "stat", store_uri],
        capture_output=True, text=True, check=False, env=os.environ | {"FORCE_COLOR": "1"},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert list(lines) == [
        *("store", "uuid", "engine", "capacity", "used", "free", "blobs", "sequences"),
        "superblock",
    ]
    assert lines["capacity"] == "16.0 MiB"
    assert lines["used"].endswith("%)")
    assert lines["superblock"].startswith("generation ")
    assert "\x1b" not in result.stdout


def test_store_in_use_is_shown_as_of_its_last_flush(store_uri: str) -> None:
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nimport numpy\nfrom spdk_kv.store import open\n"
            "with open(sys.argv[1], flush_interval_s=None) as store:\n"
            "    store.put('d', numpy.ones(3))\n    store.flush()\n"
            "    store.put('e', numpy.ones(3))\n"
            "    print('open', flush=True)\n    sys.stdin.read()",
            store_uri,
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == "open\n"
        assert report(store_uri)["blobs"] == 4
        assert stat(store_uri).exit_code == 0
    finally:
        owner.communicate()
    assert owner.returncode == 0
    assert report(store_uri)["blobs"] == 5


def test_no_store_is_an_error_and_none_is_begun(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        result = stat(f"file://{folder}")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: no store at file://")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["ram://"], "holds nothing once its process has ended"),
        (["null://"], "holds nothing once its process has ended"),
        (["what"], "not a location"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_a_usage_error(words: list[str], complaint: str) -> None:
    result = stat(*words)
    assert result.exit_code == 2
    assert complaint in result.output


def test_index_dir_is_for_block_devices(store_uri: str, tmp_path: Path) -> None:
    result = stat(store_uri, "--index-dir", str(tmp_path / "elsewhere"))
    assert result.exit_code == 2
    assert "for stores on drives" in result.output
    assert not (tmp_path / "elsewhere").exists()


def test_block_device_shows_its_superblock(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    made = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    index = str(tmp_path / "index")
    try:
        blank = stat(f"block://{device}", "--index-dir", index)
        assert blank.exit_code == 1
        assert "blank" in blank.stderr
        assert not any(image.read_bytes())
        with open_store(f"block://{device}", create=True, index_dir=index) as store:
            store.put("key", np.arange(10))
        found = report(f"block://{device}", "--index-dir", index)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    assert set(found) == KEYS
    assert found["blobs"] == 1
    assert found["capacity_nbytes"] == 31 * MIB
    assert set(found["superblock"]) == {
        *("uuid", "generation", "block_nbytes", "capacity_nbytes", "device_id")
    }
    assert found["superblock"]["uuid"] == found["uuid"]
