"""``spdk-kv fit``: the file that it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spdk_kv.cli import main
from spdk_kv.sparse import load_adapters
from support.tiny_models import WORDS, save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_llama(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(" ".join(WORDS * 5))
    return path


def fit(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["fit", "--model", str(folder), *words])


def test_writes_an_adapter_per_layer(folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    result = fit(folder, "--text", str(text), "-o", str(output), "--json")
    assert result.exit_code == 0, result.output
    found = load_adapters(output)
    assert set(found) == {0, 1, 2}
    for matrix in found.values():
        assert matrix.shape == (32, 4)
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(4), atol=1e-5)
    report = json.loads(result.stdout)
    assert report["tokens"] == 5 * len(WORDS)
    assert (report["layers"], report["rank"], report["key_elements"]) == (3, 4, 32)
    assert 0 < report["energy_least"] <= report["energy_mean"] <= 1
    assert report["nbytes"] == output.stat().st_size


def test_texts_share_the_tokens_and_rank_is_as_asked(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("drive " * 100)
    output = tmp_path / "a"
    words = ["--text", str(text), "--text", str(other), "-o", str(output)]
    result = fit(folder, *words, "--rank", "6", "--tokens", "60")
    assert result.exit_code == 0, result.output
    assert load_adapters(output)[1].shape == (32, 6)
    assert "60 tokens with a llama model" in result.stdout
    assert "6 of 32 directions in each of 3 layers" in result.stdout


def test_says_what_it_cannot_do(folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    words = ["--text", str(text), "-o", str(output)]
    too_many = fit(folder, *words, "--rank", "33")
    assert (too_many.exit_code, "a rank from 1 to 32, not 33" in too_many.output) == (2, True)
    no_model = fit(tmp_path, *words)
    assert (no_model.exit_code, "has no config.json" in no_model.output) == (1, True)
    no_gguf = fit(folder, *words, "--gguf", "model.gguf")
    assert no_gguf.exit_code == 1
    assert "gguf" in no_gguf.output
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    nothing = fit(folder, "--text", str(empty), "-o", str(output))
    assert (nothing.exit_code, "holds no text" in nothing.output) == (2, True)
    empty.write_bytes(b"ab\xff")
    binary = fit(folder, "--text", str(empty), "-o", str(output))
    assert (binary.exit_code, "not UTF-8 text (byte 2)" in binary.output) == (2, True)
    nowhere = fit(folder, "--text", str(text), "-o", str(tmp_path / "no" / "a"))
    assert (nowhere.exit_code, "cannot write" in nowhere.output) == (2, True)
    assert not output.exists()
