"""`spdk-kv trim`: what comes back, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spdk_kv import EngineOptions
from spdk_kv.cli import main
from spdk_kv.store import open as open_store

MIB = 1 << 20


def trim(*words: str) -> Result:
    return CliRunner().invoke(main, ["trim", *words])


def report(*words: str) -> dict[str, Any]:
    result = trim(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of 16 MiB with a hole of 2 MiB, 2 blobs of one, and 12 MiB that were never used."""
    path = tmp_path / "store"
    keep = EngineOptions(discard=False)
    with open_store(path, capacity="16 MiB", engine=keep) as store:
        for name in "abcd":
            store.put(name, np.full(MIB, ord(name), np.uint8))
        for name in "bc":
            store.delete(name)
    return path


def about(nbytes: int) -> Any:
    """A file's map of its extents takes a block or two of its filesystem as well."""
    return pytest.approx(nbytes, abs=64 << 10)


def check(folder: Path) -> None:
    with open_store(folder, create=False) as store:
        assert store.keys() == ["a", "d"]
        for name in "ad":
            assert (store.get(name, as_numpy=True) == ord(name)).all()


def test_gives_back_the_holes_and_the_end(folder: Path) -> None:
    assert report(f"file://{folder}") == {
        "location": f"file://{folder}",
        "given_back_nbytes": about(14 * MIB),
        "used_nbytes": 2 * MIB,
        "free_nbytes": 14 * MIB,
        "data_file_nbytes": about(3 * MIB),
    }
    assert os.stat(folder / "data").st_size == 5 * MIB
    assert report(f"file://{folder}")["given_back_nbytes"] == 0
    check(folder)


def test_compaction_makes_the_file_shorter(folder: Path) -> None:
    found = report(f"file://{folder}", "--compact")
    assert found["given_back_nbytes"] == about(14 * MIB)
    assert os.stat(folder / "data").st_size == 3 * MIB
    check(folder)


def test_says_it_in_a_line(folder: Path) -> None:
    result = trim(str(folder))
    assert result.exit_code == 0
    assert result.stdout.startswith("14.0 MiB given back; 2.0 MiB of ")
    assert result.stdout.endswith(" are in use; its data file takes 3.0 MiB\n")


def test_a_store_in_use_is_an_error_that_names_its_owner(folder: Path) -> None:
    with open_store(folder, create=False):
        result = trim(f"file://{folder}")
    assert result.exit_code == 1
    assert str(os.getpid()) in result.stderr


def test_no_store_is_an_error_and_none_is_begun(tmp_path: Path) -> None:
    result = trim(f"file://{tmp_path / 'nowhere'}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no store at file://")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["ram://"], "holds nothing once its process has ended"),
        (["what"], "not a location"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_a_usage_error(words: list[str], complaint: str) -> None:
    result = trim(*words)
    assert result.exit_code == 2
    assert complaint in result.stderr
