"""Log-probabilities, the best groups and gathering, against numpy, by every implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv._native import score as native
from support.rounds import examples
from support.scoring import NAMES

F32 = np.float32
INF = F32(np.inf)
NAN = F32(np.nan)
steady = settings(max_examples=examples(60))


def softmax_max(scores, group, name=None):
    out = np.full(-(-scores.shape[1] // group), 7, F32)
    native.softmax_max(scores, group, out, name)
    return out


def top_groups(scores, count, name=None):
    out = np.full(min(count, len(scores)), -1, np.int64)
    native.top_groups(scores, count, out, name)
    return out


# -- log-probabilities ----------------------------------------------------------------------------


def softmax_max_by_numpy(scores, group):
    wide = np.where(np.isnan(scores), -np.inf, scores).astype(float)
    n = wide.shape[1]
    out = np.full(-(-n // group), -np.inf)
    for row in wide:
        most = row.max(initial=-np.inf)
        if most == np.inf:
            logs = np.where(row == np.inf, 0, -np.inf)
        elif most == -np.inf:
            continue
        else:
            logs = row - most - np.log(np.exp(row - most).sum())
        padded = np.full(len(out) * group, -np.inf)
        padded[:n] = logs
        out = np.maximum(out, padded.reshape(-1, group).max(axis=1))
    with np.errstate(over="ignore"):
        return out.astype(F32)


def check_softmax_max(scores, group):
    expected = softmax_max_by_numpy(scores, group)
    first = softmax_max(scores, group, NAMES[0])
    np.testing.assert_allclose(first, expected, rtol=1e-6, atol=2e-5)
    for name in NAMES[1:]:
        assert softmax_max(scores, group, name).tobytes() == first.tobytes()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16, 24, 64, 1000])
def test_log_probabilities_are_those_of_numpy(group):
    rng = np.random.default_rng(group)
    for n in (0, 1, 3, 31, 32, 33, 700, 2051):
        for heads, spread in ((0, 1), (1, 0), (3, 1), (2, 8), (2, 300)):
            scores = (rng.standard_normal((heads, n)) * spread).astype(F32)
            check_softmax_max(scores, group)


@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_scores_that_are_not_finite(group):
    rng = np.random.default_rng(group)
    scores = rng.standard_normal((5, 203)).astype(F32)
    scores[0, ::7] = NAN
    scores[1, [3, 202]] = INF
    scores[1, 10] = NAN
    scores[2] = -INF
    scores[3] = NAN
    scores[4, ::5] = -INF
    for rows in ([0], [1], [2], [3], [4], [2, 3], [0, 4], [0, 1, 2, 3, 4]):
        check_softmax_max(scores[rows], group)
    assert (softmax_max(scores[[2, 3]], group) == -INF).all()
    assert softmax_max(scores[[1]], group)[-1] == 0


def test_the_greatest_and_the_least_floats():
    greatest = np.finfo(F32).max
    scores = np.array([[greatest, -greatest, 0, 1e-45, -INF]], F32)
    check_softmax_max(scores, 1)


def test_long_rows_keep_their_precision():
    scores = np.zeros((1, 300_000), F32)
    np.testing.assert_allclose(softmax_max(scores, 4), -np.log(300_000), rtol=1e-6)


special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, np.inf, -np.inf, np.nan])
floats = st.one_of(special, st.floats(-30, 30, width=32))


@steady
@given(st.lists(floats, max_size=80), st.integers(1, 9), st.sampled_from([1, 2, 4, 8]))
def test_any_row_has_the_log_probabilities_of_numpy(values, heads, group):
    row = np.array(values, F32)
    scores = np.stack([np.roll(row, number) for number in range(heads)])
    check_softmax_max(scores, group)


# -- the best groups ------------------------------------------------------------------------------


def top_groups_by_numpy(scores, count):
    """A stable sort keeps lower numbers first among equals."""
    ordered = np.lexsort((-np.where(np.isnan(scores), 0, scores), np.isnan(scores)))
    return np.sort(ordered[:count])


def check_top_groups(scores, count):
    for name in NAMES:
        assert (top_groups(scores, count, name) == top_groups_by_numpy(scores, count)).all()


@pytest.mark.parametrize("n", [0, 1, 8, 33, 5000])
def test_the_best_are_those_of_a_sort(n):
    rng = np.random.default_rng(n)
    rows = [
        rng.standard_normal(n),
        rng.integers(-2, 3, n),
        np.zeros(n),
        np.arange(n),
        -np.arange(n),
        np.where(rng.random(n) < 0.3, np.nan, rng.integers(-1, 2, n)),
        rng.choice([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 3e38], n),
        np.full(n, np.nan),
        rng.standard_normal(n) * 1e-42,
    ]
    for row in rows:
        for count in (0, 1, 2, n // 3, n - 1, n, n + 5):
            if count >= 0:
                check_top_groups(row.astype(F32), count)


@steady
@given(st.lists(st.one_of(special, st.floats(width=32)), max_size=60), st.integers(0, 70))
def test_the_best_of_any_row_are_those_of_a_sort(values, count):
    check_top_groups(np.array(values, F32), count)


# -- gathering ------------------------------------------------------------------------------------


def test_pieces_are_gathered():
    source = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    offsets = np.array([0, 990, 5, 5, 17], np.int64)
    target = np.zeros(50, np.uint8)
    native.gather(source, offsets, 10, target)
    assert (target == np.concatenate([source[o : o + 10] for o in offsets])).all()
    native.gather(source, offsets[:0], 10, target[:0])
    native.gather(source, np.array([1000], np.int64), 0, target[:0])
    data = bytearray(6)
    native.gather(b"0123456789", np.array([7, 2], np.int64), 3, data)
    assert data == b"789234"


@pytest.mark.parametrize("offset", [-1, 91, 100, 2**62, -(2**63)])
def test_pieces_that_lie_outside_are_refused_before_any_is_copied(offset):
    target = np.full(30, 7, np.uint8)
    offsets = np.array([0, 5, offset], np.int64)
    with pytest.raises(ValueError, match="not within"):
        native.gather(np.zeros(100, np.uint8), offsets, 10, target)
    assert (target == 7).all()


@pytest.mark.parametrize(("nbytes", "size"), [(10, 19), (10, 21), (-1, 0), (2**62, 0), (-10, -0)])
def test_a_target_of_another_size_is_refused(nbytes, size):
    with pytest.raises(ValueError, match=r"target has|not within"):
        native.gather(
            np.zeros(100, np.uint8), np.zeros(2, np.int64), nbytes, np.zeros(size, np.uint8)
        )


def test_pieces_greater_than_the_source_are_refused():
    with pytest.raises(ValueError, match="not within"):
        native.gather(bytes(10), np.zeros(1, np.int64), 11, bytearray(11))


def test_counts_that_make_no_sense_are_refused():
    scores, out = np.zeros((2, 9), F32), np.full(3, 7, F32)
    for group in (0, -1, 2, 5):
        with pytest.raises(ValueError, match="group"):
            native.softmax_max(scores, group, out)
    native.softmax_max(scores, 2**62, out[:1])
    numbers = np.full(3, 7, np.int64)
    for count in (-1, 2, 4):
        with pytest.raises(ValueError, match=r"wanted|numbers"):
            native.top_groups(scores[0], count, numbers)
    assert (numbers == 7).all()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(LookupError, match="abacus"):
        native.top_groups(np.zeros(1, F32), 1, np.zeros(1, np.int64), "abacus")
    assert native.implementation() == NAMES[0]
