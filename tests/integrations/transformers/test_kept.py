"""Layers that stay in memory: exact, whatever is done with what was handed out before."""

from __future__ import annotations

import random

import pytest
import torch

from spdk_kv.integrations.transformers.kept import Kept


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def tokens(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, count, 8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_it_is_what_joining_would_be(dtype: torch.dtype) -> None:
    numbers = random.Random(0)
    wanted = tokens(5, dtype)
    kept = Kept(wanted)
    handed_out = []
    for _ in range(400):
        new = tokens(numbers.choice([1, 1, 1, 7, 40]), dtype)
        past = min(wanted.shape[2], numbers.choice([wanted.shape[2], 30]))
        wanted = torch.cat([wanted[:, :, wanted.shape[2] - past :], new], dim=2)
        kept = kept.followed_by(new, past)
        handed_out.append((kept.tensor, wanted))
    for found, expected in handed_out:
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_token_is_mostly_written_where_there_is_room() -> None:
    kept = Kept(tokens(1000))
    places = set()
    for _ in range(100):
        kept = kept.followed_by(tokens(1), kept.tensor.shape[2])
        places.add(kept.tensor.data_ptr())
    assert len(places) == 1


def test_two_that_go_on_from_the_same_tokens_do_not_meet() -> None:
    begun = Kept(tokens(10)).followed_by(tokens(1), 10)
    one, other = tokens(1), tokens(1)
    first, second = begun.followed_by(one, 11), begun.followed_by(other, 11)
    assert torch.equal(first.tensor, torch.cat([begun.tensor, one], dim=2))
    assert torch.equal(second.tensor, torch.cat([begun.tensor, other], dim=2))


def test_it_goes_on_outside_inference_mode_and_with_gradients() -> None:
    with torch.inference_mode():
        kept = Kept(tokens(4)).followed_by(tokens(1), 4).followed_by(tokens(1), 5)
        before = kept.tensor.clone()
    kept = kept.followed_by(tokens(1), 6)
    assert torch.equal(kept.tensor[:, :, :6], before)
    with torch.enable_grad():
        query = torch.randn(2, 3, 1, 8, requires_grad=True)
        kept = Kept(kept.tensor.clone()).followed_by(tokens(1), 7)
        scores = query @ kept.tensor.transpose(2, 3)
        kept.followed_by(tokens(1), 8)
        scores.sum().backward()
        assert query.grad is not None
