"""Every setting stands in docs/reference/settings.md, with its default."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest

import spdk_kv
from docs.pages import page
from spdk_kv.integrations.transformers import OffloadedKVCache, PromptCache, SparseKVCache
from spdk_kv.sparse import Settings
from spdk_kv.store import KVStore

_ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \|[^|]*\| *(?:`([^`]*)`)?[^|]*\|", re.MULTILINE)
# Given by place, and explained in the text.
_NOT_SETTINGS = {"self", "location", "name", "store", "config", "model"}


def shown(section: str) -> dict[str, str]:
    """Setting -> default, of the tables below a heading of the page."""
    text = page("docs/reference/settings.md").text.partition(f"\n## {section}\n")[2]
    rows = _ROW.findall(text.partition("\n## ")[0])
    return {name: default for names, default in rows for name in re.findall(r"\w+", names)}


def settings_of(what: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    if is_dataclass(what):
        for field in fields(what):
            default = field.default
            if default is MISSING and field.default_factory is not MISSING:
                default = field.default_factory()
            yield field.name, default
        return
    for name, parameter in inspect.signature(what).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue  # what is accepted for one more release
        if name in _NOT_SETTINGS and parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        yield name, parameter.default


@pytest.mark.parametrize(
    ("what", "section"),
    [
        (spdk_kv.open, "spdk_kv.open"),
        (spdk_kv.EngineOptions, "EngineOptions"),
        (spdk_kv.PageCacheOptions, "PageCacheOptions"),
        (KVStore.sequence, "KVStore.sequence and KVShape"),
        (spdk_kv.KVShape, "KVStore.sequence and KVShape"),
        (OffloadedKVCache, "OffloadedKVCache"),
        (SparseKVCache, "SparseKVCache"),
        (PromptCache, "PromptCache"),
        (Settings, "sparse.Settings"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_every_setting_has_a_row_with_its_default(what: Any, section: str) -> None:
    rows = shown(section)
    for name, default in settings_of(what):
        assert name in rows, f"{name} is missing under {section}"
        if default in (inspect.Parameter.empty, MISSING):
            assert not rows[name], f"{name} has no default"
        elif name != "granularity":  # what it is when nobody says depends on the sequence
            assert rows[name] == repr(default).replace("'", '"'), name


def test_the_page_names_no_setting_that_is_gone() -> None:
    for what, section in (
        (spdk_kv.open, "spdk_kv.open"),
        (spdk_kv.EngineOptions, "EngineOptions"),
        (spdk_kv.PageCacheOptions, "PageCacheOptions"),
        (OffloadedKVCache, "OffloadedKVCache"),
        (SparseKVCache, "SparseKVCache"),
        (PromptCache, "PromptCache"),
        (Settings, "sparse.Settings"),
    ):
        assert set(shown(section)) <= {name for name, _ in settings_of(what)}
