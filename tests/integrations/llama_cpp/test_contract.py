"""The host's contract: recorded, and as it is where the host is installed.

python test_contract.py   # in the host's environment: records it anew
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from integrations.signatures import Recorded, accepts, load, record, save
from spdk_kv.integrations.llama_cpp import StateCache

RECORDED = Path(__file__).with_name("signatures.json")
OURS = ("__contains__", "__getitem__", "__setitem__", "cache_size")
# What the cache uses of a Llama beyond its contract.
THEIRS = (
    *("_create_completion", "save_state", "load_state", "set_cache", "n_ctx", "close"),
    *("_input_ids", "ctx", "model"),
)
CALLS = (
    *("llama_get_memory", "llama_memory_clear", "llama_memory_seq_cp", "llama_memory_seq_rm"),
    *("llama_memory_seq_pos_min", "llama_memory_seq_pos_max"),
    *("llama_model_has_encoder", "llama_model_is_hybrid", "llama_model_is_recurrent"),
    *("llama_model_n_swa", "llama_state_get_data", "llama_state_get_size", "llama_state_set_data"),
    *("llama_state_seq_get_data", "llama_state_seq_get_size", "llama_state_seq_set_data"),
)


def of_the_host() -> dict[str, Recorded]:
    import llama_cpp

    class Functions:
        """llama.cpp's functions, as methods that have no ``self``."""

    for name in CALLS:
        setattr(Functions, name, staticmethod(getattr(llama_cpp, name)))
    return {
        "BaseLlamaCache": record(llama_cpp.llama_cache.BaseLlamaCache, OURS),
        "Llama": record(llama_cpp.Llama, THEIRS),
        "LlamaState": record(llama_cpp.LlamaState, ["__init__"]),
        "functions": record(Functions, CALLS),
    }


def test_every_call_of_the_host_is_taken() -> None:
    contract = load(RECORDED)["BaseLlamaCache"]
    assert set(contract) == set(OURS)
    assert accepts(StateCache, contract) == []


def test_the_host_is_as_it_was_recorded() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    assert of_the_host() == load(RECORDED)


if __name__ == "__main__":
    save(RECORDED, of_the_host())
