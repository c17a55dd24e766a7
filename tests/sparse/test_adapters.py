"""Adapters: a fit equals a decomposition of the keys, and a file gives back the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spdk_kv.sparse import LowRank, load_adapters
from spdk_kv.sparse.adapters import GramMatrix, save_adapters


def keys(tokens: int, seed: int = 0) -> torch.Tensor:
    """[1, 2, tokens, 8], of which a few directions hold most; not centred."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 3, generator=random) @ torch.randn(3, 16, generator=random)
    noisy = mixed + 0.05 * torch.randn(tokens, 16, generator=random) + 0.5
    return noisy.view(1, tokens, 2, 8).transpose(1, 2)


def joined(k: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return k.transpose(1, 2).reshape(-1, 16).double().numpy()


def gathered(*pieces: torch.Tensor) -> GramMatrix:
    gram = GramMatrix()
    for piece in pieces:
        gram.add(piece)
    return gram


def test_directions_are_the_right_singular_vectors_of_all_keys() -> None:
    k = keys(100)
    matrix, energy = gathered(k[:, :, :30], k[:, :, 30:]).directions(4)
    _, values, vectors = np.linalg.svd(joined(k))
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(np.abs(vectors[:4] @ matrix), np.eye(4), atol=1e-4)
    assert energy == pytest.approx((values[:4] ** 2).sum() / (values**2).sum())


def test_an_eighth_of_a_key_is_kept_by_default_and_at_least_one_direction() -> None:
    assert gathered(keys(20)).directions()[0].shape == (16, 2)
    assert gathered(torch.randn(2, 1, 9, 4)).directions()[0].shape == (4, 1)


def test_batch_rows_and_dtypes_add_up() -> None:
    both = gathered(torch.cat([keys(10), keys(10, seed=1)]).half())
    apart = gathered(keys(10).half(), keys(10, seed=1).half())
    assert both.tokens == apart.tokens == 20
    np.testing.assert_array_equal(both.directions(16)[0], apart.directions(16)[0])


def test_keys_that_cannot_be_fitted_are_refused() -> None:
    gram = gathered(keys(10))
    broken = keys(3).clone()
    broken[0, 1, 2, 5] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        gram.add(broken)
    with pytest.raises(ValueError, match="8 elements after such of 16"):
        gram.add(torch.zeros(1, 1, 3, 8))
    for rank in (0, 17):
        with pytest.raises(ValueError, match="from 1 to 16"):
            gram.directions(rank)
    with pytest.raises(ValueError, match="no keys"):
        GramMatrix().directions(2)
    assert gram.tokens == 10


def test_zeros_have_directions_too() -> None:
    matrix, energy = gathered(torch.zeros(1, 2, 5, 8)).directions(3)
    assert (matrix.shape, energy) == ((16, 3), 1.0)


def test_a_file_gives_back_what_selectors_take(tmp_path: Path) -> None:
    k = keys(60)
    matrix, _ = gathered(k).directions(4)
    save_adapters(tmp_path / "a", {3: matrix, 0: matrix[:, :2]}, {"tokens": "60"})
    found = load_adapters(tmp_path / "a")
    assert set(found) == {0, 3}
    np.testing.assert_array_equal(found[3], matrix)
    low = LowRank(None, found[3])
    low.append(k)
    query = k[:, :, -1]
    exact = torch.einsum("bhd,bhtd->bht", query, k).numpy()
    np.testing.assert_allclose(low.scores(query), exact, rtol=0.05, atol=1.0)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_adapters(path, {0: np.eye(4, dtype=np.float32)}, {})
    with pytest.raises(OSError, match="directory"):
        save_adapters(tmp_path, {0: np.eye(4, dtype=np.float32)}, {})
    save_adapters(path, {1: np.eye(2, dtype=np.float32)}, {})
    assert set(load_adapters(path)) == {1}
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError):
        load_adapters(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"a is no whole safetensors file"):
        load_adapters(path)
    save_file({"layers.0": np.eye(4, dtype=np.float32)}, path)
    with pytest.raises(ValueError, match="holds no adapters"):
        load_adapters(path)
    save_adapters(path, {0: np.eye(4, dtype=np.float32)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_adapters(path)
    for name, matrix in [
        ("bias", np.eye(4, dtype=np.float32)),
        ("layers.0", np.eye(4, dtype=np.float64)),
        ("layers.0", np.ones(4, dtype=np.float32)),
        ("layers.0", np.full((4, 4), np.nan, dtype=np.float32)),
    ]:
        save_file({name: matrix}, path, {"format": "spdk_kv adapters 1"})
        with pytest.raises(ValueError, match=name):
            load_adapters(path)
