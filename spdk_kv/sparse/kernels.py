"""What scoring computes, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_STEP = np.float32(0.9957)  # of the uniform quantiser with four levels, in sigmas of a Gaussian


def rotate(x: Floats, signs: Floats) -> Floats:
    """H (signs * x) over the last axis; H: normalised Walsh-Hadamard over blocks of the largest
    power of two that divides it."""
    dim = x.shape[-1]
    block = dim & -dim
    y = x * signs
    width = 1
    with np.errstate(invalid="ignore", over="ignore"):
        while width < block:
            pairs = y.reshape(-1, dim // (2 * width), 2, width)
            low, high = pairs[:, :, 0], pairs[:, :, 1]
            y = np.stack([low + high, low - high], axis=2)
            width *= 2
    turned: Floats = (y / np.float32(np.sqrt(block))).reshape(x.shape).astype(np.float32)
    return turned


def encode(
    keys: Floats, mean: Floats, signs: Floats, codes: npt.NDArray[np.uint8], scales: Floats
) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        turned = rotate(keys - mean, signs)
        good = np.isfinite(np.abs(turned).sum(axis=1))
        turned = np.where(good[:, None], turned, np.float32(0))
        sigma = np.sqrt((turned.astype(np.float64) ** 2).mean(axis=1)).astype(np.float32)
        step = np.where(sigma > 0, sigma * _STEP, np.float32(1))
        code = np.clip(np.floor(turned / step[:, None]) + 2, 0, 3).astype(np.uint8)
        level = code.astype(np.float32) - np.float32(1.5)
        fitted = (turned * level).sum(axis=1) / (level * level).sum(axis=1)
    scales[:] = np.where(good & (sigma > 0), fitted, 0)
    four = code.reshape(len(code), -1, 4)
    codes[:] = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def score(
    queries: Floats, signs: Floats, codes: npt.NDArray[np.uint8], scales: Floats, out: Floats
) -> None:
    turned = np.nan_to_num(rotate(queries, signs), nan=0.0, posinf=0.0, neginf=0.0)
    four = np.stack([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    level = four.reshape(len(codes), -1).astype(np.float32) - np.float32(1.5)
    np.multiply(turned @ level.T, scales, out=out)


def softmax_max(scores: Floats, group: int, out: Floats) -> None:
    heads, tokens = scores.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        clean = np.where(np.isnan(scores), -np.inf, scores)
        top = clean.max(axis=1, keepdims=True, initial=-np.inf)
        total = np.exp(clean - top).sum(axis=1, keepdims=True)
        found = clean - (top + np.log(total))
        found = np.where(np.isposinf(clean), 0, np.where(np.isnan(found), -np.inf, found))
    groups = -(-tokens // group)
    padded = np.full((heads, groups * group), -np.inf, np.float32)
    padded[:, :tokens] = found
    out[:] = padded.reshape(heads, groups, group).max(axis=(0, 2), initial=-np.inf)


def top_groups(scores: Floats, count: int, out: npt.NDArray[np.int64]) -> None:
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    out[:] = np.sort(order[:count])
