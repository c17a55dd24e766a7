"""The option objects of `spdk_kv.open`, and the keywords that they replaced."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spdk_kv
from spdk_kv import EngineOptions, PageCacheOptions
from store.helpers import folder_fixture

folder = folder_fixture

QUICK: dict[str, Any] = {"capacity": "8 MiB", "flush_interval_s": None}


def file_uri(folder: Path) -> str:
    return f"file://{folder / 'kv'}"


def test_what_the_objects_say_reaches_the_store(folder: Path) -> None:
    copies = folder / "copies"
    copies.mkdir()
    engine = EngineOptions("ram", depth=3, segment="64 KiB", hugepages=False, staging=1 << 20)
    page_cache = PageCacheOptions("paper", memory="2 MiB")
    with spdk_kv.open("ram://", engine=engine, page_cache=page_cache, **QUICK) as store:
        assert (store.engine.depth, store.engine.segment_nbytes) == (3, 64 << 10)
        assert store.stats()["residency"]["policy"] == "paper"
        for _ in range(8):  # leases beyond the staging memory are not kept
            store.put("a", np.zeros(2 << 20, np.uint8))
        assert store.stats()["staging"]["free_nbytes"] <= 1 << 20


def test_the_defaults_are_those_of_empty_objects() -> None:
    assert EngineOptions().queue_options == EngineOptions(segment=1 << 20).queue_options
    assert EngineOptions().staging_nbytes == 512 << 20
    assert PageCacheOptions().memory_nbytes is None
    assert PageCacheOptions(folder="copies").folder_path == str(Path("copies").absolute())


def test_an_engine_is_named_either_way(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in ("threads", EngineOptions("threads"), EngineOptions(name="threads")):
            with spdk_kv.open(file_uri(folder), engine=engine, **QUICK) as store:
                assert store.engine.name == "threads"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"depth": 2}, "engine=spdk_kv.EngineOptions(depth=...)"),
        ({"segment": "64 KiB"}, "engine=spdk_kv.EngineOptions(segment=...)"),
        ({"staging": "8 MiB"}, "engine=spdk_kv.EngineOptions(staging=...)"),
        ({"hugepages": False}, "engine=spdk_kv.EngineOptions(hugepages=...)"),
        ({"queue_pairs": 1}, "engine=spdk_kv.EngineOptions(queue_pairs=...)"),
        ({"discard": True}, "engine=spdk_kv.EngineOptions(discard=...)"),
        ({"residency": "paper"}, "page_cache=spdk_kv.PageCacheOptions(policy=...)"),
        ({"page_cache": "2 GiB"}, "page_cache=spdk_kv.PageCacheOptions(memory=...)"),
        ({"page_cache": 1 << 20}, "page_cache=spdk_kv.PageCacheOptions(memory=...)"),
        ({"page_cache_dir": None}, "page_cache=spdk_kv.PageCacheOptions(folder=...)"),
        ({"mmap": False}, "page_cache=spdk_kv.PageCacheOptions(mmap=...)"),
    ],
)
def test_an_old_keyword_warns_where_it_was_written(
    folder: Path, old: dict[str, Any], new: str
) -> None:
    with pytest.warns(DeprecationWarning, match=r"spdk_kv\.open") as caught:
        store = spdk_kv.open("ram://", **QUICK, **old)
    store.close()
    (warning,) = caught
    assert str(warning.message).startswith(f"{next(iter(old))}= of spdk_kv.open goes away")
    assert str(warning.message).endswith(f"use {new}")
    assert warning.filename == __file__


def test_old_keywords_still_work(folder: Path) -> None:
    with pytest.warns(DeprecationWarning, match="goes away") as caught:
        store = spdk_kv.open(
            file_uri(folder), engine="threads", depth=3, segment="64 KiB", hugepages=False,
            residency="paper", page_cache="3 MiB", **QUICK,
        )  # fmt: skip
    assert len(caught) == 5
    with store:
        assert (store.engine.name, store.engine.depth) == ("threads", 3)
        assert store.engine.segment_nbytes == 64 << 10
        store.sequence("s", spdk_kv.KVShape(1, 1, 8, "float32", 8))
        store.paths.decide()
        residency = store.stats()["residency"]
        assert (residency["policy"], residency["available_nbytes"]) == ("paper", 3 << 20)
    with pytest.warns(DeprecationWarning, match="PageCacheOptions"):
        store = spdk_kv.open(file_uri(folder), engine="pagecache", mmap=True, **QUICK)
    with store:
        store.put("a", np.arange(8))
        mapped = store.get("a")
        assert mapped.tolist() == list(range(8))
        assert len(store.mappings) == 1


@pytest.mark.parametrize(
    "both",
    [
        {"engine": EngineOptions(), "depth": 3},
        {"engine": EngineOptions("threads"), "discard": True},
        {"page_cache": PageCacheOptions(), "residency": "paper"},
        {"page_cache": PageCacheOptions(memory="1 GiB"), "page_cache_dir": "/tmp"},
    ],
)
def test_an_old_keyword_beside_its_object_is_refused(folder: Path, both: dict[str, Any]) -> None:
    old = list(both)[1]
    with pytest.raises(TypeError, match=f"^{old}= was given beside"):
        spdk_kv.open(file_uri(folder), **both)
    assert list(folder.iterdir()) == []


def test_an_unknown_keyword_is_refused() -> None:
    unknown: dict[str, Any] = {"dept": 3}
    with pytest.raises(TypeError, match="unexpected keyword argument 'dept'"):
        spdk_kv.open("ram://", **unknown)


@pytest.mark.parametrize(
    ("kind", "field", "wrong", "error"),
    [
        (EngineOptions, "name", 3, TypeError),
        (EngineOptions, "depth", 0, ValueError),
        (EngineOptions, "depth", 5000, ValueError),
        (EngineOptions, "depth", "16", TypeError),
        (EngineOptions, "depth", True, TypeError),
        (EngineOptions, "segment", 5000, ValueError),
        (EngineOptions, "segment", "2 GiB", ValueError),
        (EngineOptions, "segment", "much", ValueError),
        (EngineOptions, "segment", 1.5, TypeError),
        (EngineOptions, "queue_pairs", 0, ValueError),
        (EngineOptions, "queue_pairs", None, TypeError),
        (EngineOptions, "hugepages", 1, TypeError),
        (EngineOptions, "staging", -1, ValueError),
        (EngineOptions, "staging", None, TypeError),
        (EngineOptions, "discard", "yes", TypeError),
        (PageCacheOptions, "policy", "fast", ValueError),
        (PageCacheOptions, "policy", None, TypeError),
        (PageCacheOptions, "memory", -1, ValueError),
        (PageCacheOptions, "memory", "much", ValueError),
        (PageCacheOptions, "memory", 0.5, TypeError),
        (PageCacheOptions, "folder", 3, TypeError),
        (PageCacheOptions, "folder", b"/tmp", TypeError),
        (PageCacheOptions, "mmap", 1, TypeError),
    ],
)
def test_wrong_values_are_refused_by_name(
    kind: Any, field: str, wrong: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"{kind.__name__}(\.{field}|: {field})|no residency policy"):
        kind(**{field: wrong})
