"""The programs of docs/examples run as they are, and stay short."""

from __future__ import annotations

import runpy
import tempfile
import warnings
from pathlib import Path

import pytest

from support.places import ROOT

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
MOST_LINES = 40


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(example)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        runpy.run_path(str(example), run_name="__main__")
    assert capfd.readouterr().out, "an example shows something"
    assert not list(tmp_path.rglob("index.sqlite")), "an example leaves no store behind"


def test_there_are_examples_and_each_is_short() -> None:
    assert len(EXAMPLES) >= 5
    for example in EXAMPLES:
        assert example.read_text().count("\n") < MOST_LINES, example.name
