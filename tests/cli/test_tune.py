"""``spdk-kv tune``: what it reports and writes, in memory and in folders."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spdk_kv.cli import main
from spdk_kv.cli.tune.plot import text_plot
from spdk_kv.sparse import Settings
from spdk_kv.store import open as open_store
from support.terminal import run_on_terminal
from support.tiny_models import save_tiny_llama

QUICK = ["--seconds", "0.01", "--size", "4MiB", "--tokens", "1024"]
FIELDS = {
    *("model", "location", "engine", "memory_nbytes", "layers", "token_nbytes", "metadata_nbytes"),
    *("tokens", "batch", "reads", "whole_nbytes_per_s", "score_s", "compute_s", "frontier"),
    *("whole", "share", "settings", "cost", "why"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a configuration: weights are not needed."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_llama(path)
    for file in path.iterdir():
        if file.name != "config.json":
            file.unlink()
    return path


def tune(folder: Path, location: str, *words: str) -> Result:
    command = ["tune", "--model", str(folder), "--location", location, *QUICK, *words]
    return CliRunner().invoke(main, command)


def report(folder: Path, location: str, *words: str) -> dict[str, Any]:
    result = tune(folder, location, "--json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("scheme", ["ram", "file"])
def test_reports_measurements_a_frontier_and_a_choice(
    folder: Path, tmp_path: Path, scheme: str
) -> None:
    location = "ram://" if scheme == "ram" else f"file://{tmp_path}"
    found = report(folder, location, "--memory", "1MiB", "--share", "10")
    assert set(found) == FIELDS
    assert (found["layers"], found["token_nbytes"], found["metadata_nbytes"]) == (3, 256, 16)
    assert {row["group_tokens"] for row in found["reads"]} == {4, 8, 16, 32, 64}
    assert 0.1 in [row["share"] for row in found["frontier"]]
    assert all(row["tokens_per_s"] > 0 for row in [*found["frontier"], found["whole"]])
    assert found["cost"]["memory_nbytes"] <= 1 << 20
    assert Settings(**found["settings"]).tokens >= 0.1 * 1024
    assert list(tmp_path.iterdir()) == []


def test_writes_settings_and_says_how_to_use_them(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "settings.json"
    result = tune(folder, "ram://", "-o", str(output), "--batch", "2", "--compute-ms", "7.5")
    assert result.exit_code == 0, result.output
    settings = Settings.from_json(output.read_text())
    assert f"Chosen: tokens={settings.tokens} " in result.stdout
    assert "1,024 tokens, 2 rows" in result.stdout
    assert "computing     7.5 ms per step" in result.stdout
    assert "SparseKVCache(store, model, settings=settings)" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "/" not in line)


def test_prints_the_settings_where_no_file_is_named(folder: Path) -> None:
    result = tune(folder, "ram://")
    assert result.exit_code == 0, result.output
    Settings.from_json(result.stdout[result.stdout.index("\n{") :])


def test_a_terminal_gets_tables_that_fit(folder: Path) -> None:
    command = [sys.executable, "-m", "spdk_kv", "tune", "--model", str(folder)]
    shown = run_on_terminal([*command, "--location", "ram://", *QUICK, "--memory", "1MiB"])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    tables = plain[plain.index("Reads of groups") : plain.index("Chosen:")]
    assert "bound by" in tables
    assert max(map(len, tables.splitlines())) <= 80


def test_a_store_in_the_folder_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with open_store(tmp_path, capacity="16 MiB") as store:
        before = sorted(tmp_path.iterdir())
        assert tune(folder, f"file://{tmp_path}").exit_code == 0
        assert sorted(tmp_path.iterdir()) == before
        assert store.sequences() == []


def test_too_little_memory_says_how_much_it_takes(folder: Path) -> None:
    result = tune(folder, "ram://", "--memory", "20KiB")
    assert result.exit_code == 1
    assert "1,024 tokens take" in result.output


def test_what_makes_no_sense_is_refused(folder: Path, tmp_path: Path) -> None:
    for words, said in [
        (["null://"], "keeps no bytes"),
        (["ftp://x"], "--location"),
        (["ram://", "--tokens", "4096"], "takes at most 2048"),
        (["ram://", "--memory", "much"], "--memory"),
        (["ram://", "-o", str(tmp_path / "none" / "x")], "cannot write"),
    ]:
        result = tune(folder, *words)
        assert (result.exit_code, said in result.output) == (2, True), result.output
    missing = tune(folder, f"file://{tmp_path}/none")
    assert (missing.exit_code, "none" in missing.output) == (1, True), missing.output


def test_a_picture_is_drawn_where_matplotlib_is_installed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "tune.png"
    assert tune(folder, "ram://", "--plot", str(picture)).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_an_error_that_says_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = tune(folder, "ram://", "--plot", str(tmp_path / "tune.png"))
    assert result.exit_code == 1
    assert "pip install 'spdk_kv[bench]'" in result.output


def test_bars_are_as_long_as_their_values() -> None:
    lines = text_plot([("1 %", 10.0), ("100 %", 5.0), ("2 %", 0.0)]).splitlines()
    assert lines[0] == f"  1 % {'█' * 44} 10"
    assert lines[1] == f"100 % {'█' * 22} 5"
    assert lines[2] == "  2 %  0"
