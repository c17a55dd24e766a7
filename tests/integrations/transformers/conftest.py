"""Fixtures of the tests with real models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spdk_kv.store import EngineOptions, KVStore
from spdk_kv.store import open as open_store


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Tiny matrices: torch's second thread only spins, and disturbs whoever shares the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with open_store(
        f"file://{tmp_path}/kv", capacity="256 MiB", engine=EngineOptions(segment="64 KiB")
    ) as opened:
        yield opened
