"""The tokens of every kind of generation are those of DynamicCache, with real models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from integrations.transformers.models import FAMILIES, SIZES, assert_same, model_of, prompt
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from spdk_kv.types import Granularity

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVStore]:
    folder = tmp_path_factory.mktemp("tokens")
    with open_store(f"file://{folder}/kv", capacity="256 MiB") as opened:
        yield opened


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(
    store: KVStore, family: str, dtype: torch.dtype, attention: str, batch: int
) -> None:
    # A chunk holds 128 tokens of one head in bfloat16.
    stats = assert_same(store, model_of(family, dtype, attention), prompt(batch, 150))
    assert stats["drive_read_nbytes"] > 0
    assert stats["resident_layers_peak"] == 2
    assert stats["prefetch_hits"] > 0
    assert stats["prefetch_misses"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search(store: KVStore, family: str, dtype: torch.dtype) -> None:
    stats = assert_same(store, model_of(family, dtype), prompt(2, 70), options={"num_beams": 3})
    assert stats["drive_read_nbytes"] > 0
    assert stats["resident_layers_peak"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_with_layers_kept_in_memory(store: KVStore, family: str) -> None:
    options = {"num_beams": 3, "max_new_tokens": 8}
    stats = assert_same(store, model_of(family), prompt(2, 70), options=options, resident_layers=3)
    assert stats["kept_layers"] == 1
    assert stats["resident_layers_peak"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_a_seed(store: KVStore, family: str) -> None:
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
    assert_same(store, model_of(family), prompt(2, 60), options=options)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_longer_than_several_chunks(store: KVStore, family: str) -> None:
    stats = assert_same(store, model_of(family), prompt(1, 20), options={"max_new_tokens": 120})
    assert stats["drive_read_nbytes"] > stats["appended_nbytes"]


@pytest.mark.parametrize(
    ("family", "dtype"), [(f, DTYPES[n % len(DTYPES)]) for n, f in enumerate(FAMILIES)], ids=str
)
def test_assisted_decoding(store: KVStore, family: str, dtype: torch.dtype) -> None:
    # Another seed's model guesses badly, the same one always right: both ways through crop.
    for seed in (0, 1):
        assistant = model_of(family, dtype, "sdpa", seed)
        options = {"assistant_model": assistant, "max_new_tokens": 48}
        stats = assert_same(store, model_of(family, dtype), prompt(1, 90), options=options)
        assert stats["drive_read_nbytes"] > 0
        assert stats["resident_layers_peak"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_decoding(store: KVStore, family: str) -> None:
    inputs = prompt(1, 30)
    inputs = {name: tensor.repeat(1, 3) for name, tensor in inputs.items()}
    assert_same(store, model_of(family), inputs, options={"prompt_lookup_num_tokens": 5})


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(store: KVStore, family: str) -> None:
    stats = assert_same(store, model_of(family), prompt(2, 150), options={"prefill_chunk_size": 64})
    assert stats["resident_layers_peak"] == 2


@pytest.mark.parametrize("resident", range(1, 7))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_number_of_resident_layers(store: KVStore, family: str, resident: int) -> None:
    layers = SIZES["num_hidden_layers"]
    stats = assert_same(store, model_of(family), prompt(2, 100), resident_layers=resident)
    assert stats["resident_layers_peak"] == min(resident, layers)
    assert stats["kept_layers"] == (layers if resident >= layers else max(0, resident - 2))
    assert (stats["drive_read_nbytes"] > 0) == (resident < layers)
    assert (stats["prefetch_hits"] > 0) == (1 < resident < layers)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_either_order_on_the_drive(store: KVStore, family: str, granularity: Granularity) -> None:
    assert_same(store, model_of(family), prompt(3, 120), granularity=granularity)


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache", "ram"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_every_engine(tmp_path: Path, family: str, engine: str) -> None:
    where = "ram://" if engine == "ram" else f"file://{tmp_path}/kv"
    chosen = None if engine == "ram" else engine
    with open_store(where, capacity="64 MiB", engine=chosen) as store:
        stats = assert_same(store, model_of(family), prompt(2, 100))
    assert stats["drive_read_nbytes"] > 0


def test_sliding_window_reads_only_the_window(store: KVStore) -> None:
    sizes = {}
    for family in ("llama", "mistral"):
        stats = assert_same(store, model_of(family), prompt(1, 800))
        sizes[family] = stats["drive_read_nbytes"]
    # 40 tokens lie in two or three chunks of 32, beside the 25 chunks of 800.
    assert sizes["mistral"] < sizes["llama"] / 6
