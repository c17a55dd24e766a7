"""Models whose state cannot be cut: it serves what goes on from exactly there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integrations.llama_cpp.models import (
    answer,
    evaluated,
    open_llama,
    text,
    write_mamba,
    write_sliding,
)
from spdk_kv.integrations.llama_cpp import StateCache
from spdk_kv.store import KVStore

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

COUNT = 8
PROMPT = text(1, 200)


@pytest.fixture(params=[write_mamba, write_sliding], ids=["recurrent", "sliding window"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write: Callable[[Path], Path] = request.param
    return write(tmp_path / "whole.gguf")


def cached(path: Path, store: KVStore) -> tuple[Any, StateCache]:
    llama = open_llama(path)
    cache = StateCache(store, llama)
    llama.set_cache(cache)
    return llama, cache


def test_a_chat_goes_on_in_another_process(path: Path, store: KVStore) -> None:
    first, cache = cached(path, store)
    said = [*PROMPT, *answer(first, PROMPT, COUNT)]
    cache.wait()
    assert cache.stats()["saved"] == 1
    further = [*said, *text(2, 50)[1:]]
    expected = answer(first, further, COUNT)
    first.close()
    second, cache = cached(path, store)
    got: list[int] = []
    computed = evaluated(second, lambda: got.extend(answer(second, further, COUNT)))
    assert got == expected
    assert computed == 49 + COUNT - 1
    assert cache.stats()["restored_tokens"] == len(said)
    second.close()


def test_what_it_cannot_be_cut_to_is_computed(path: Path, store: KVStore) -> None:
    first, cache = cached(path, store)
    expected = answer(first, PROMPT, COUNT)
    said = [*PROMPT, *expected]
    cache.wait()
    first.close()
    second, cache = cached(path, store)
    # The prompt alone, and all that was computed: its last token would have to be taken back.
    assert PROMPT not in cache
    assert said not in cache
    assert answer(second, PROMPT, COUNT) == expected
    second.close()


def test_a_chat_that_was_left_is_taken_up_after_another(path: Path, store: KVStore) -> None:
    llama, cache = cached(path, store)
    said = [*PROMPT, *answer(llama, PROMPT, COUNT)]
    further = [*said, *text(2, 50)[1:]]
    answer(llama, text(3, 100), COUNT)
    cache.wait()
    assert evaluated(llama, lambda: answer(llama, further, COUNT)) == 49 + COUNT - 1
    llama.close()
