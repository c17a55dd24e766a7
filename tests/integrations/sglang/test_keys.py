"""Whose a page is, where its store lies, and how much of a prompt is there: without SGLang."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spdk_kv
from spdk_kv.integrations.sglang.hits import Wanted, leading, restorable
from spdk_kv.integrations.sglang.identity import Keys, model_facts, pool_facts, shard_facts
from spdk_kv.integrations.sglang.options import place, read_options

STORED = st.lists(st.booleans(), max_size=12)


@dataclass
class Config:
    """As SGLang's."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    dp_rank: int = 0
    is_mla_model: bool = False
    enable_storage_metrics: bool = False
    model_name: str | None = "model"
    extra_config: dict[str, Any] | None = field(default_factory=dict)


def test_importing_the_plug_in_imports_no_host() -> None:
    script = (
        "import sys, spdk_kv.integrations.sglang, spdk_kv.integrations.sglang.backend as b\n"
        "assert b.Backend\n"
        "assert 'sglang' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- options -------------------------------------------------------------------------------------


def test_what_is_the_hosts_is_left_to_it_and_the_rest_is_for_the_store() -> None:
    options = read_options(
        {
            "backend_name": "spdk_kv",
            "module_path": "spdk_kv.integrations.sglang",
            "class_name": "HiCacheSpdkKv",
            "interface_v1": 1,
            "prefetch_threshold": 64,
            "location": "file:///kv",
            "capacity": "1 GiB",
            "engine": {"depth": 32},
            "page_cache": {"policy": "direct"},
        }
    )
    assert options.location == "file:///kv"
    assert options.settings == {
        "capacity": "1 GiB",
        "engine": spdk_kv.EngineOptions(depth=32),
        "page_cache": spdk_kv.PageCacheOptions(policy="direct"),
    }


def test_whatever_a_store_is_opened_with_can_be_set() -> None:
    ours = set(inspect.signature(spdk_kv.open).parameters) - {"location", "read_only", "renamed"}
    given = dict.fromkeys(ours)
    assert read_options({"location": "ram://", **given}).settings == given


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "location"),
        ({"location": 5}, "location"),
        ({"location": "ram://", "capacityy": 1}, "capacityy"),
        ({"location": "ram://", "read_only": "yes"}, "read_only"),
        ({"location": "ram://", "identity": 7}, "identity"),
        ({"location": "ram://", "engine": {"deptj": 1}}, "deptj"),
        ({"location": "ram://", "engine": {"depth": 0}}, "depth"),
    ],
)
def test_what_is_wrong_with_an_option_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_options(wrong)


# -- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shared", "expected"),
    [
        (Config(), False, "file:///kv"),
        (Config(tp_rank=1, tp_size=4), False, "file:///kv/tp1of4"),
        (Config(tp_rank=1, tp_size=4), True, "file:///kv"),
        (Config(tp_rank=1, tp_size=4, pp_rank=2, pp_size=3), False, "file:///kv/tp1of4-pp2of3"),
        (Config(tp_rank=1, tp_size=4, pp_rank=2, pp_size=3), True, "file:///kv/pp2of3"),
        (Config(attn_cp_rank=1, attn_cp_size=2), False, "file:///kv/cp1of2"),
        (Config(dp_rank=3, tp_rank=1, tp_size=2), False, "file:///kv/tp1of2-dp3"),
        (Config(dp_rank=3, tp_rank=1, tp_size=2), True, "file:///kv/dp3"),
    ],
)
def test_each_rank_has_a_folder(config: Config, shared: bool, expected: str) -> None:
    assert place("file:///kv", config, shared=shared) == expected


def test_a_location_may_say_where_the_ranks_go() -> None:
    config = Config(tp_rank=1, tp_size=2)
    assert place("ng:///dev/ng{tp_rank}n1", config, shared=False) == "ng:///dev/ng1n1"
    assert place("file:///mnt/{tp_rank}/kv", config, shared=True) == "file:///mnt/0/kv"
    with pytest.raises(ValueError, match="tp_rank"):
        place("ng:///dev/ng0n1", config, shared=False)
    assert place("ng:///dev/ng0n1", Config(), shared=False) == "ng:///dev/ng0n1"


# -- whose ----------------------------------------------------------------------------------------


class Pool:
    """A host pool, as far as it tells of itself."""

    def __init__(self, **facts: Any) -> None:
        vars(self).update({"layout": "page_first", "dtype": "bfloat16", "page_size": 64}, **facts)


class OtherPool(Pool):
    pass


def key(
    config: Config, pool: Pool, *, identity: str = "", shared: bool = False, name: str = "hash"
) -> str:
    keys = Keys(model_facts(config, identity), shard_facts(config, shared=shared), pool_facts(pool))
    return keys(name)


def test_pages_of_anything_else_have_other_keys() -> None:
    two = {"tp_size": 2, "pp_size": 2, "attn_cp_size": 2}
    found = [
        key(Config(), Pool()),
        key(Config(), Pool(), name="other hash"),
        key(Config(), Pool(), identity="revision 2"),
        key(Config(model_name="other"), Pool()),
        key(Config(model_name=None), Pool()),
        key(Config(**two), Pool()),
        key(Config(**two, tp_rank=1), Pool()),
        key(Config(**two, pp_rank=1), Pool()),
        key(Config(**two, attn_cp_rank=1), Pool()),
        key(Config(), Pool(dtype="float16")),
        key(Config(), Pool(layout="layer_first")),
        key(Config(), Pool(page_size=32)),
        key(Config(), Pool(head_num=8)),
        key(Config(), OtherPool()),
    ]
    assert len(set(found)) == len(found)
    assert key(Config(), Pool()) == found[0]


def test_what_all_ranks_have_alike_has_one_key() -> None:
    ranks = [Config(tp_rank=rank, tp_size=4) for rank in range(4)]
    assert len({key(rank, Pool(), shared=True) for rank in ranks}) == 1
    assert len({key(rank, Pool(), shared=False) for rank in ranks}) == 4


def test_keys_are_short_and_begin_with_their_model() -> None:
    config = Config()
    model = model_facts(config, "")
    keys = Keys(model, {"a": 1})
    long = keys("k" * 1024)
    assert len(long) == len(keys("")) < 48
    assert long.startswith(Keys(model, {"a": 2}).prefix)
    assert not long.startswith(Keys(model_facts(config, "other"), {"a": 1}).prefix)


def test_a_model_that_is_known_by_its_name_only_is_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_facts(Config(model_name="org/model"), "")
    assert "'org/model' by its name only" in caplog.text
    caplog.clear()
    model_facts(Config(model_name="org/model"), "main")
    (tmp_path / "weights").write_bytes(b"1234")
    model_facts(Config(model_name=str(tmp_path)), "")
    assert not caplog.text


def test_other_weights_in_the_same_folder_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    config = Config(model_name=str(tmp_path))
    before = key(config, Pool())
    assert key(config, Pool()) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert key(config, Pool()) != before


# -- how much ------------------------------------------------------------------------------------


@given(
    st.lists(st.booleans(), max_size=12), st.lists(st.booleans(), max_size=12), st.integers(1, 4)
)
def test_what_can_be_restored_is_there(
    all_of: list[bool], some_of: list[bool], trailing: int
) -> None:
    pages = min(len(all_of), len(some_of))
    every, window = Wanted("every", all_of), Wanted("window", some_of, trailing)
    possible, own = restorable(pages, [every, window])
    for length in range(1, pages + 1):
        there = all(all_of[:length]) and all(some_of[max(0, length - trailing) : length])
        assert (length in possible) == there
    assert own.get("every", 0) == leading(all_of[:pages])
    assert possible == sorted(possible)


def test_without_other_pools_every_length_can_be_restored() -> None:
    assert restorable(3, []) == ([1, 2, 3], {})
    assert restorable(0, [Wanted("any", [])]) == ([], {})
    assert leading([True, False, True]) == 1
