"""Which groups are selected, and how a selection is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spdk_kv.sparse import Selector, Settings, presets

WIDTH = 32
G = 4


def selector(k: torch.Tensor, **changes: Any) -> Selector:
    named = {"keys": "exact", "tokens": 16, "group_tokens": G, "sinks": 4, "recent": 0, **changes}
    made = Selector(Settings(**named))
    made.append(k, first=None)
    return made


def quiet(tokens: int, *, batch: int = 1, kv_heads: int = 2, size: float = 0.1) -> torch.Tensor:
    made = torch.Generator().manual_seed(1)
    return size * torch.randn(batch, kv_heads, tokens, WIDTH, generator=made)


def query(batch: int = 1, heads: int = 4) -> torch.Tensor:
    made = torch.Generator().manual_seed(2)
    return torch.nn.functional.normalize(torch.randn(batch, heads, WIDTH, generator=made), dim=-1)


def plant(
    k: torch.Tensor, q: torch.Tensor, head: int, token: int, *, row: int = 0, size: float = 60
) -> None:
    """Makes ``head`` attend to ``token``."""
    k[row, head * k.shape[1] // q.shape[1], token] = size * q[row, head]


def test_a_token_that_one_head_needs_is_found_where_the_mean_loses_it() -> None:
    q = query()
    k = quiet(200)
    plant(k, q, head=3, token=150, size=30)
    # All other heads agree on what they like a little, and their scores add up.
    for token in range(40, 80):
        k[0, :, token] = 20 * (q[0, :3].sum(0) - q[0, 3])
    wanted = 150 // G
    assert wanted in selector(k, sinks=0).select(q, whole_groups=50)[0]
    assert wanted not in selector(k, sinks=0, aggregation="mean").select(q, whole_groups=50)[0]


@pytest.mark.parametrize("keys", ["exact", "codes"])
def test_finds_what_every_head_needs(keys: str) -> None:
    q, k = query(), quiet(200)
    places = [30, 77, 123, 190]
    for head, token in enumerate(places):
        plant(k, q, head, token)
    found = selector(k, keys=keys, tokens=20).select(q, whole_groups=50)
    assert found.dtype == np.int64
    assert found[0].tolist() == [0, *(token // G for token in places)]


def test_the_mean_takes_the_best_token_of_a_group() -> None:
    q, k = query(), torch.zeros(1, 2, 80, WIDTH)
    k[0, :, 41] = q[0].sum(0)
    k[0, :, 63] = 0.5 * q[0].sum(0)
    found = selector(k, aggregation="mean", sinks=0, tokens=8).select(q, whole_groups=20)
    assert found[0].tolist() == [10, 15]


def test_sinks_are_always_there() -> None:
    q, k = query(), quiet(200)
    for head in range(4):
        plant(k, q, head, 100 + 8 * head)
    found = selector(k, sinks=5, tokens=24).select(q, whole_groups=50)
    assert found[0].tolist() == [0, 1, 25, 27, 29, 31]
    everything = selector(k, sinks=16).select(q, whole_groups=50)
    assert everything[0].tolist() == [0, 1, 2, 3]


def test_fewer_groups_than_are_wanted_are_all_taken() -> None:
    q, k = query(2), quiet(15, batch=2)
    assert selector(k).select(q, whole_groups=3).tolist() == [[0, 1, 2]] * 2
    assert selector(k).select(q, whole_groups=0).shape == (2, 0)


def test_a_prompt_that_is_shorter_than_a_group() -> None:
    held = selector(quiet(3))
    assert held.select(query(), whole_groups=held.settings.whole_groups(3)).shape == (1, 0)
    assert held.coverage(query(), np.empty((1, 0), np.int64), whole_groups=0).tolist() == [1.0]


def test_groups_that_are_not_known_yet_are_refused() -> None:
    with pytest.raises(ValueError, match="only 15 tokens are known"):
        selector(quiet(15)).select(query(), whole_groups=4)


def test_rows_choose_for_themselves() -> None:
    q, k = query(2), quiet(200, batch=2)
    plant(k, q, 0, 60, row=0)
    plant(k, q, 0, 140, row=1)
    found = selector(k, tokens=8).select(q, whole_groups=50)
    assert found.tolist() == [[0, 15], [0, 35]]


def test_padding_is_chosen_only_where_there_is_nothing_else() -> None:
    q, k = query(2), quiet(80, batch=2)
    k[:, :, :40] = 1000 * q[0].sum(0)
    held = selector(k, tokens=16, sinks=4)
    found = held.select(q, first=[0, 42], whole_groups=20)
    assert found[0].tolist() == [0, 1, 2, 3]
    # Group 10 has the first real tokens of row 1, which are its sinks.
    assert {10, 11} <= set(found[1].tolist())
    assert (found[1] >= 10).all()
    few = held.select(q, first=[0, 76], whole_groups=20)
    assert few[1].tolist() == [0, 1, 2, 19]
    none = held.select(q, first=[80, 90], whole_groups=20)
    assert none.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_selection_is_whole_whatever_the_numbers_are(preset: str, bad: float) -> None:
    keys = {"kvswap": "lowrank", "lowrank": "lowrank", "exact": "exact"}.get(preset, "codes")
    aggregation = "mean" if preset == "kvswap" else "softmax_max"
    k, q = quiet(200), query()
    k[0, 0, 50:60] = bad
    held = selector(k, keys=keys, aggregation=aggregation, tokens=80)
    for queries in (q, q * bad, torch.full_like(q, bad)):
        found = held.select(queries, first=[101], whole_groups=50)
        assert found.shape == (1, 20)
        assert (np.diff(found) > 0).all()
        # There are 25 groups with real tokens, and none of padding is taken before them.
        assert found.min() >= 25
        assert found.max() < 50
        covered = held.coverage(queries, found, first=[101], whole_groups=50)
        assert 0 <= covered[0] <= 1


def test_groups_that_cannot_be_scored_come_after_those_that_can() -> None:
    q, k = query(), quiet(80)
    k[0, :, 8:48] = float("nan")
    found = selector(k, tokens=40, sinks=0).select(q, whole_groups=20)
    assert found[0].tolist() == [0, 1, *range(12, 20)]


def test_tokens_that_are_too_new_to_be_chosen_count_in_the_softmax() -> None:
    q, k = query(heads=2), torch.zeros(1, 2, 88, WIDTH)
    # Head 0 looks at the newest tokens, and what it likes among the others matters little to it.
    for token, size in ((81, 400.0), (20, 40.0)):
        k[0, 0, token] = size * q[0, 0]
    k[0, 1, 60] = 20 * q[0, 1]
    found = selector(k, tokens=4, sinks=0).select(q, whole_groups=20)
    assert found[0].tolist() == [15]


def test_the_scale_of_the_layer_is_the_one_of_the_softmax() -> None:
    q, k = query(heads=2), torch.zeros(1, 2, 80, WIDTH)
    # Head 0 has one token that stands out, head 1 two that stand out more.
    k[0, 0, 20] = 30 * q[0, 0]
    k[0, 1, 60] = k[0, 1, 70] = 36 * q[0, 1]
    sharp = Selector(Settings(keys="exact", tokens=4, sinks=0), scale=1.0)
    flat = Selector(Settings(keys="exact", tokens=4, sinks=0), scale=0.05)
    for each in (sharp, flat, sharp.copy()):
        each.append(k) if not each.tokens else None
    assert sharp.select(q, whole_groups=20)[0].tolist() == [5]
    assert flat.select(q, whole_groups=20)[0].tolist() == [15]
    assert sharp.copy().select(q, whole_groups=20)[0].tolist() == [5]


def test_coverage_is_that_of_the_head_that_loses_most() -> None:
    q, k = query(), quiet(200, size=0.01)
    for head, token in enumerate([30, 77, 123, 190]):
        plant(k, q, head, token)
    held = selector(k, tokens=20)
    good = held.select(q, whole_groups=50)
    assert held.coverage(q, good, whole_groups=50).tolist() == [1.0]
    one_is_missing = good.copy()
    one_is_missing[0, 4] = 48
    covered, wanted = held.rescore(q, one_is_missing, whole_groups=50)
    assert covered[0] < 0.1
    assert (wanted == good).all()


def test_what_is_in_memory_anyway_is_covered() -> None:
    q, k = query(heads=2), quiet(88, size=0.01)
    for head in range(2):
        plant(k, q, head, 85)
    held = selector(k)
    assert held.coverage(q, np.array([[7, 8, 9, 10]]), whole_groups=20)[0] > 0.9
    assert held.coverage(q, np.array([[7, 8, 9, 10]]), whole_groups=22)[0] < 0.2


def test_state_copy_truncation_and_reordering_reach_the_keys() -> None:
    q, k = query(2), quiet(200, batch=2)
    plant(k, q, 0, 60, row=0)
    plant(k, q, 0, 140, row=1)
    held = selector(k, keys="codes", tokens=8)
    assert held.nbytes == held.keys.nbytes > 0
    again = Selector.from_state(held.settings, held.state(), scale=1.0)
    assert again.tokens == 200
    assert again.scale == 1.0
    assert again.select(q, whole_groups=50).tolist() == [[0, 15], [0, 35]]
    again.reorder([1, 0])
    assert again.select(q[[1, 0]], whole_groups=50).tolist() == [[0, 35], [0, 15]]
    short = held.copy(100)
    held.truncate(120)
    assert (held.tokens, short.tokens) == (120, 100)
    assert short.select(q, whole_groups=25)[0].tolist() == [0, 15]
