"""The models, written once, and stores to try them with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import spdk_kv
from integrations.llama_cpp.models import write_llama
from spdk_kv.store import KVStore


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "tiny.gguf")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with spdk_kv.open(f"file://{tmp_path}/store", capacity="64 MiB") as store:
        yield store
