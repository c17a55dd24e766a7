"""States are taken up by the model and settings that made them, and by nobody else."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import spdk_kv
from integrations.llama_cpp.models import answer, open_llama, text, write_llama
from spdk_kv.integrations.llama_cpp import StateCache, identity
from spdk_kv.integrations.llama_cpp.identity import fingerprint
from spdk_kv.store import KVStore

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PROMPT = text(1, 200)


@pytest.fixture
def remembered(model_path: Path, store: KVStore) -> KVStore:
    """A store with the state of ``PROMPT``."""
    llama = open_llama(model_path)
    cache = StateCache(store, llama)
    llama.set_cache(cache)
    answer(llama, PROMPT)
    cache.wait()
    llama.close()
    return store


def is_found(store: KVStore, path: Path, **options: Any) -> bool:
    llama = open_llama(path, **options)
    try:
        return PROMPT in StateCache(store, llama)
    finally:
        llama.close()


@pytest.mark.parametrize(
    "options", [{"n_batch": 64, "n_ubatch": 32}, {"n_gpu_layers": 1}, {"logits_all": True}]
)
def test_settings_of_speed_are_no_others(
    remembered: KVStore, model_path: Path, options: dict[str, Any]
) -> None:
    assert is_found(remembered, model_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"flash_attn": True},
        {"type_k": 8},
        {"rope_freq_base": 5000.0},
        {"rope_freq_scale": 0.5},
        {"rope_scaling_type": 2},
        {"yarn_orig_ctx": 512},
        {"n_ctx": 1024},
        {"kv_overrides": {"llama.rope.freq_base": 5000.0}},
    ],
    ids=str,
)
def test_other_settings_are_a_miss(
    remembered: KVStore, model_path: Path, options: dict[str, Any]
) -> None:
    assert not is_found(remembered, model_path, **options)


def test_another_model_is_a_miss_under_the_same_name_too(
    remembered: KVStore, model_path: Path, tmp_path: Path
) -> None:
    assert not is_found(remembered, write_llama(tmp_path / "other.gguf", seed=2))
    copied = Path(shutil.copy(model_path, tmp_path / "copied.gguf"))
    assert is_found(remembered, copied)
    # One bit of one weight, and the times as before.
    times = os.stat(copied)
    with copied.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-4, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(copied, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not is_found(remembered, copied)


def test_another_release_of_the_host_is_a_miss(
    remembered: KVStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.37")
    assert not is_found(remembered, model_path)


def test_files_are_read_once(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def sha256() -> Any:
        read.append("again")
        return hashlib.sha256()

    counting = SimpleNamespace(sha256=sha256, blake2b=hashlib.blake2b)
    monkeypatch.setattr(identity, "hashlib", counting)
    llama = open_llama(model_path)
    location = f"file://{tmp_path}/store"
    with spdk_kv.open(location, capacity="1 MiB") as store:
        first = fingerprint(store, llama)
        assert len(read) == 1
        assert fingerprint(store, llama) == first
    with spdk_kv.open(location, read_only=True) as store:
        assert fingerprint(store, llama) == first
    assert len(read) == 1
    os.utime(model_path)
    with spdk_kv.open(location) as store:
        assert fingerprint(store, llama) == first
    assert len(read) == 2
    llama.close()


def test_a_model_in_several_files_is_all_of_them(
    model_path: Path, store: KVStore, tmp_path: Path
) -> None:
    names = [tmp_path / f"parts-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in names:
        shutil.copy(model_path, name)
    llama = open_llama(model_path)
    whole = fingerprint(store, llama)
    llama.model_path = str(names[0])
    parts = fingerprint(store, llama)
    with names[1].open("ab") as file:
        file.write(b"\0")
    assert len({whole, parts, fingerprint(store, llama)}) == 3
    llama.close()
