"""What stands for the query of a layer that was not reached yet."""

from __future__ import annotations

import torch

from spdk_kv.sparse import norm_of, predict


def test_each_predictor_begins_with_its_norm() -> None:
    this, following = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    assert norm_of("next_norm", this, following) is following
    assert norm_of("this_norm", this, following) is this
    assert norm_of("previous", this, following) is None


def test_the_last_token_is_normed_projected_and_rotated() -> None:
    hidden = torch.arange(24.0).view(2, 3, 4).requires_grad_()

    def project(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (2, 1, 4)
        return x.view(2, 1, 2, 2).transpose(1, 2)

    found = predict(hidden, norm=lambda x: x + 1, project=project, rotate=lambda q: -q)
    assert found.shape == (2, 2, 2)
    assert not found.requires_grad
    assert found.tolist() == [[[-9, -10], [-11, -12]], [[-21, -22], [-23, -24]]]
