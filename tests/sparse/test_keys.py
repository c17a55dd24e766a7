"""What is kept of the keys: how near its scores are, and that it follows its sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from spdk_kv.sparse import Codes, Exact, Keys, LowRank, Settings, make_keys, preset, presets
from spdk_kv.sparse.keys import keys_from_state

KINDS = ("codes", "lowrank", "exact")
kinds = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str) -> Settings:
    return preset("codes", keys=kind)


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    """Keys that lie around a mean, further off in some directions than in others."""
    made = torch.Generator().manual_seed(seed)
    width = shape[-1]
    steady = torch.Generator().manual_seed(99)
    mix = torch.randn(width, width, generator=steady) * torch.logspace(0, -0.5, width)[:, None]
    mean = 3 * torch.randn(width, generator=steady)
    return torch.randn(*shape, generator=made) @ mix + mean


def query(batch: int, heads: int, width: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, heads, width, generator=torch.Generator().manual_seed(seed))


def products(q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    """[batch, heads, tokens], exactly."""
    batch, kv_heads, _, width = k.shape
    found = q.view(batch, kv_heads, -1, width) @ k.float().transpose(-1, -2)
    return found.reshape(batch, q.shape[1], -1).numpy()


def correlation(found: np.ndarray, exact: np.ndarray) -> float:
    """The least over all rows and heads: a constant per head makes no difference."""
    pairs = zip(found.reshape(-1, found.shape[-1]), exact.reshape(-1, exact.shape[-1]), strict=True)
    return min(float(np.corrcoef(one, other)[0, 1]) for one, other in pairs)


@pytest.mark.parametrize(
    ("kind", "least"), [("codes", 0.9), ("lowrank", 0.999), ("exact", 0.999999)]
)
@pytest.mark.parametrize("width", [32, 64, 80, 128])
def test_scores_are_near_the_products(kind: str, least: float, width: int) -> None:
    k, q = keys(2, 3, 300, width), query(2, 9, width)
    held = make_keys(preset("codes", keys=kind, rank=3 * width))
    held.append(k)
    found = held.scores(q)
    assert found.shape == (2, 9, 300)
    assert found.dtype == np.float32
    assert correlation(found, products(q, k)) > least


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_any_float_dtype_and_any_strides(kind: str, dtype: torch.dtype) -> None:
    k = keys(1, 40, 2, 32).to(dtype).transpose(1, 2)
    held, plain = make_keys(settings(kind)), make_keys(settings(kind))
    held.append(k)
    plain.append(k.float().contiguous())
    q = query(1, 4, 32)
    assert (held.scores(q) == plain.scores(q)).all()


@kinds
def test_appending_bit_by_bit_is_appending(kind: str) -> None:
    k, q = keys(2, 2, 200, 32), query(2, 4, 32)
    bits, whole = make_keys(settings(kind)), make_keys(settings(kind))
    bits.append(k[:, :, :100])
    whole.append(k[:, :, :100])
    bits.append(k[:, :, :0])
    for token in range(100, 170):
        bits.append(k[:, :, token : token + 1])
    bits.append(k[:, :, 170:])
    whole.append(k[:, :, 100:])
    assert bits.tokens == whole.tokens == 200
    assert np.allclose(bits.scores(q), whole.scores(q), rtol=1e-3, atol=1e-2)


@kinds
def test_follows_truncation_reordering_and_copies(kind: str) -> None:
    k, q = keys(2, 2, 120, 32), query(2, 4, 32)
    held = make_keys(settings(kind))
    held.append(k)
    before = held.scores(q)
    other, short = held.copy(), held.copy(50)
    held.truncate(70)
    assert held.tokens == 70
    assert np.allclose(held.scores(q), before[:, :, :70], rtol=1e-5, atol=1e-4)
    held.append(k[:, :, 70:])
    assert np.allclose(held.scores(q), before, rtol=1e-3, atol=1e-2)
    held.reorder([1, 1, 0])
    more = torch.stack([q[1], q[1], q[0]])
    assert np.allclose(held.scores(more), before[[1, 1, 0]], rtol=1e-3, atol=1e-2)
    assert (other.scores(q) == before).all()
    assert short.tokens == 50
    assert np.allclose(short.scores(q), before[:, :, :50], rtol=1e-5, atol=1e-4)


@kinds
def test_a_truncation_beyond_the_end_changes_nothing(kind: str) -> None:
    held = make_keys(settings(kind))
    held.append(keys(1, 2, 10, 32))
    held.truncate(11)
    assert held.tokens == 10


@kinds
def test_nothing_is_left_of_a_sequence_that_was_truncated_to_nothing(kind: str) -> None:
    held, new = make_keys(settings(kind)), make_keys(settings(kind))
    held.append(keys(2, 2, 30, 32))
    held.truncate(0)
    for each in (held, new):
        each.append(keys(1, 4, 30, 64, seed=3))
    q = query(1, 4, 64)
    assert (held.scores(q) == new.scores(q)).all()


@kinds
def test_state_there_and_back(kind: str) -> None:
    held = make_keys(settings(kind))
    held.append(keys(2, 2, 90, 32))
    held.truncate(80)
    state = {name: array.copy() for name, array in held.state().items()}
    again = keys_from_state(settings(kind), state)
    q = query(2, 4, 32)
    assert (again.scores(q) == held.scores(q)).all()
    for each in (held, again):
        each.append(keys(2, 2, 5, 32, seed=9))
    assert (again.scores(q) == held.scores(q)).all()
    assert keys_from_state(settings(kind), make_keys(settings(kind)).state()).tokens == 0


@kinds
def test_a_state_that_does_not_fit_is_refused(kind: str) -> None:
    held = make_keys(settings(kind))
    held.append(keys(1, 2, 10, 32))
    state = held.state()
    name = next(iter(state))
    for wrong in (
        {"else": state[name]},
        {**state, name: state[name][0]},
        {**state, name: state[name].astype(np.float64)},
    ):
        with pytest.raises(ValueError, match="a state has"):
            keys_from_state(settings(kind), wrong)


@pytest.mark.parametrize("kind", ["codes", "lowrank"])
def test_arrays_of_a_state_that_do_not_fit_to_each_other_are_refused(kind: str) -> None:
    held = make_keys(settings(kind))
    held.append(keys(1, 2, 10, 32))
    state = held.state()
    name = "codes" if kind == "codes" else "low"
    with pytest.raises(ValueError, match="differ"):
        keys_from_state(settings(kind), {**state, name: state[name][..., :-1]})


@kinds
def test_one_key_that_is_no_number_spoils_no_other(kind: str) -> None:
    k, q = keys(1, 2, 100, 32), query(1, 4, 32)
    clean = make_keys(settings(kind))
    clean.append(k)
    for bad in (float("nan"), float("inf"), -float("inf")):
        held = make_keys(settings(kind))
        spoilt = k.clone()
        spoilt[0, :, 7, 3] = bad
        held.append(spoilt)
        others = np.arange(100) != 7
        found, expected = held.scores(q)[:, :, others], clean.scores(q)[:, :, others]
        assert np.isfinite(found).all()
        assert correlation(found, expected) > 0.98


def test_an_outlier_does_not_coarsen_the_codes_of_others() -> None:
    k, q = keys(1, 1, 200, 64), query(1, 3, 64)
    k[0, 0, 0] *= 50
    held = Codes()
    held.append(k)
    found, exact = held.scores(q), products(q, k)
    assert correlation(found[:, :, 1:], exact[:, :, 1:]) > 0.9
    # And of the outlier itself the size is right, against the mean of all.
    exact -= (q.view(3, 64) @ k.mean(2)[0, 0]).numpy()[None, :, None]
    assert np.allclose(found[0, :, 0], exact[0, :, 0], atol=0.35 * np.abs(exact[0, :, 0]).max())


@pytest.mark.parametrize("kind", ["codes", "lowrank"])
def test_padding_has_no_part_in_what_is_fitted(kind: str) -> None:
    k, q = keys(2, 2, 100, 32), query(2, 4, 32)
    padded = torch.cat([1000 * torch.randn(2, 2, 30, 32), k], dim=2)
    clean, held = make_keys(settings(kind)), make_keys(settings(kind))
    clean.append(k)
    held.append(padded, first=[30, 30])
    assert np.allclose(held.scores(q)[:, :, 30:], clean.scores(q), rtol=1e-2, atol=2e-2)


@kinds
@pytest.mark.parametrize("first", [[5], [9]])
def test_a_row_of_padding_only(kind: str, first: Sequence[int]) -> None:
    held = make_keys(settings(kind))
    held.append(keys(1, 2, 5, 32), first=first)
    assert np.isfinite(held.scores(query(1, 2, 32))).all()


@kinds
def test_shapes_that_do_not_fit_are_refused(kind: str) -> None:
    held = make_keys(settings(kind))
    with pytest.raises(ValueError, match="no keys"):
        held.scores(query(1, 2, 32))
    held.append(keys(1, 2, 5, 32))
    for shape in ((2, 2, 5, 32), (1, 3, 5, 32), (1, 2, 5, 16)):
        with pytest.raises(ValueError, match="follow those of"):
            held.append(keys(*shape))
    with pytest.raises(ValueError, match="keys are"):
        held.append(keys(2, 5, 32))
    for shape in ((2, 2, 32), (1, 3, 32), (1, 2, 16), (1, 0, 32)):
        with pytest.raises(ValueError, match="a query is"):
            held.scores(query(*shape))
    assert held.tokens == 5


def test_codes_need_a_head_dim_of_whole_bytes() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        Codes().append(keys(1, 1, 5, 30))


def test_bytes_per_token() -> None:
    of = {}
    for kind in KINDS:
        held = make_keys(settings(kind))
        assert (held.nbytes, held.token_nbytes) == (0, 0)
        held.append(keys(2, 3, 1000, 64))
        of[kind] = held.token_nbytes
        assert 2000 * of[kind] <= held.nbytes <= 1.2 * 2000 * of[kind] + 20_000
    assert of == {"codes": 3 * (16 + 4), "lowrank": 2 * 24, "exact": 4 * 192}


def test_an_adapter_is_used_instead_of_the_prompt() -> None:
    k = keys(1, 2, 50, 32)
    adapter = np.eye(64, 10, dtype=np.float32)
    held = LowRank(4, adapter)
    held.append(k)
    q = query(1, 2, 32)
    # The first 4 of 64 elements are those of KV head 0; nothing is seen of head 1.
    expected = q[:, :1, :4] @ k[:, 0, :, :4].transpose(-1, -2)
    assert np.allclose(held.scores(q)[:, 0], expected.numpy()[:, 0], rtol=1e-2, atol=1e-2)
    assert (held.scores(q)[:, 1] == 0).all()
    with pytest.raises(ValueError, match="adapter for keys of 64 elements, not 32"):
        LowRank(4, adapter).append(keys(1, 1, 50, 32))
    with pytest.raises(ValueError, match="no 11 directions"):
        LowRank(11, adapter)


def test_low_rank_directions_are_those_that_hold_most() -> None:
    flat = torch.randn(1, 1, 400, 3) @ torch.randn(3, 32)
    held = LowRank(3)
    held.append(flat)
    q = query(1, 2, 32)
    assert correlation(held.scores(q), products(q, flat)) > 0.9999


def test_every_preset_has_keys() -> None:
    made: list[Keys] = [make_keys(preset(name)) for name in presets()]
    assert {type(one) for one in made} == {Codes, LowRank, Exact}
