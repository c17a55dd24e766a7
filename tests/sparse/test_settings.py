"""Settings of reading a part: what is refused, and JSON there and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from spdk_kv.sparse import Settings, preset, presets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selector", "quest"),
        ("tokens", 0),
        ("tokens", 258),
        ("tokens", 256.0),
        ("tokens", True),
        ("group_tokens", 3),
        ("group_tokens", 65),
        ("keys", "2-bit"),
        ("predictor", "norm"),
        ("aggregation", None),
        ("sinks", -1),
        ("sinks", 260),
        ("recent", -1),
        ("recent", 1.5),
        ("pool", 0.5),
        ("pool", math.nan),
        ("pool", math.inf),
        ("pool", "2"),
        ("rank", 0),
        ("correction", 1.1),
        ("correction", -0.1),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})
    if isinstance(value, float) and not math.isfinite(value):
        return
    with pytest.raises(ValueError, match=name):
        Settings.from_json(json.dumps({name: value}))


@pytest.mark.parametrize("name", presets())
def test_json_there_and_back(name: str) -> None:
    settings = preset(name, tokens=96, group_tokens=8, correction=0.5, rank=24)
    assert Settings.from_json(settings.to_json()) == settings


def test_what_json_leaves_out_is_as_its_selector_has_it() -> None:
    found = Settings.from_json('{"selector": "kvswap", "tokens": 128}')
    assert found == preset("kvswap", tokens=128)
    assert (found.keys, found.aggregation, found.sinks, found.pool) == ("lowrank", "mean", 0, 1.0)
    assert Settings.from_json("{}") == Settings()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object, not list"),
        ('{"token": 3, "tokens": 64, "grups": 1}', "unknown settings: grups, token"),
    ],
)
def test_json_that_holds_no_settings_is_refused(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Settings.from_json(text)


def test_counts() -> None:
    settings = Settings(tokens=64, group_tokens=4, recent=10, pool=2.5)
    assert (settings.count, settings.slots) == (16, 40)
    assert [settings.whole_groups(tokens) for tokens in (0, 9, 13, 14, 18)] == [0, 0, 0, 1, 2]
    assert preset("kvswap", tokens=64).slots == 16


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"selector.*'best'"):
        preset("best")
