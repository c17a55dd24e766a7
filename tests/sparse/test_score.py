"""Codes of keys and their scores, against numpy: the same bits from every implementation."""

from __future__ import annotations

import ctypes
import mmap
import threading

import numpy as np
import pytest

from spdk_kv._native import score as native
from support.scoring import NAMES

F32 = np.float32
INF = F32(np.inf)
NAN = F32(np.nan)
# Whole words of a code and parts of one, blocks of transforms from 4 to 256.
DIMENSIONS = [4, 12, 32, 48, 64, 80, 96, 112, 128, 144, 256, 1024]
COUNTS = [0, 1, 7, 16, 33, 100]


def hadamard(dim: int) -> np.ndarray:
    """The rotation as a matrix, in doubles."""
    block = dim & -dim
    one = np.ones((1, 1))
    while len(one) < block:
        one = np.block([[one, one], [one, -one]])
    return np.kron(np.eye(dim // block), one) / np.sqrt(block)


def butterflies(x: np.ndarray) -> np.ndarray:
    """The same without its norm, in floats, in the order of a fast transform."""
    dim = x.shape[1]
    half = 1
    while half < dim & -dim:
        pairs = x.reshape(len(x), dim // (2 * half), 2, half)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack([low + high, low - high], axis=2).reshape(len(x), dim)
        half *= 2
    return x


def norm(dim: int) -> np.float32:
    return F32(1) / np.sqrt(F32(dim & -dim))


def packed(elements: np.ndarray) -> np.ndarray:
    n, dim = elements.shape
    four = elements.astype(np.uint8).reshape(n, dim // 4, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def unpacked(codes: np.ndarray) -> np.ndarray:
    n, nbytes = codes.shape
    return (codes[:, :, None] >> np.array([0, 2, 4, 6]) & 3).reshape(n, 4 * nbytes)


def encoded_by_numpy(keys, mean, signs):
    """In floats, summing in the order of a head's dimensions, so that every bit can be compared."""
    n, dim = keys.shape
    with np.errstate(all="ignore"):
        x = butterflies((keys - mean) * signs)
        squares = np.zeros(n, F32)
        for d in range(dim):
            squares += x[:, d] * x[:, d]
        usable = (squares > 0) & (squares < INF)
        step = F32(0.9957) * np.sqrt(squares / F32(dim))
        codes = sum((x >= bound[:, None]).astype(int) for bound in (-step, 0 * step, step))
        along, levels = np.zeros(n, F32), np.zeros(n, F32)
        for d in range(dim):
            level = codes[:, d].astype(F32) - F32(1.5)
            along += x[:, d] * level
            levels += level * level
        scales = np.where(usable, along / levels * norm(dim), F32(0))
    return packed(np.where(usable[:, None], codes, 0)), scales


def scored_by_numpy(queries, signs, codes, scales):
    dim = queries.shape[1]
    with np.errstate(all="ignore"):
        x = butterflies(queries * signs) * norm(dim)
        most = np.abs(x).max(axis=1)
        inverse = F32(127) / most
        usable = np.isfinite(x).all(axis=1) & np.isfinite(inverse)
        rounded = np.rint(x * inverse[:, None])
        rounded = np.where(usable[:, None], rounded, 0).astype(np.int64)
        factors = np.where(usable, most / F32(127) / F32(2), F32(0))
    twice = rounded @ (2 * unpacked(codes).astype(np.int64) - 3).T
    return twice.astype(F32) * factors[:, None] * scales


def keys_of(rng, n, dim):
    """Keys as models have them: offsets that all share, and outliers."""
    keys = rng.standard_normal((n, dim)).astype(F32) + rng.standard_normal(dim).astype(F32) * 4
    return keys * rng.choice([F32(0.01), F32(1), F32(30)], (n, 1))


def encode(keys, mean, signs, name=None):
    n, dim = keys.shape
    codes, scales = np.full((n, dim // 4), 0xEE, np.uint8), np.full(n, 7, F32)
    native.encode(keys, mean, signs, codes, scales, name)
    return codes, scales


def score(queries, signs, codes, scales, name=None):
    out = np.full((len(queries), len(codes)), 7, F32)
    native.score(queries, signs, codes, scales, out, name)
    return out


def head(rng, n, dim):
    """Keys, their mean, and signs."""
    keys = keys_of(rng, n, dim)
    mean = keys.mean(axis=0) if n else np.zeros(dim, F32)
    return keys, mean.astype(F32), rng.choice([F32(-1), F32(1)], dim)


# -- codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_codes_are_those_of_numpy(name, dim):
    rng = np.random.default_rng(dim)
    for n in COUNTS:
        keys, mean, signs = head(rng, n, dim)
        codes, scales = encode(keys, mean, signs, name)
        expected_codes, expected_scales = encoded_by_numpy(keys, mean, signs)
        assert (codes == expected_codes).all()
        assert (scales == expected_scales).all()


@pytest.mark.parametrize("dim", [32, 80, 96, 128])
def test_codes_decode_to_the_rotated_keys_nearly(dim):
    rng = np.random.default_rng(dim)
    keys = rng.standard_normal((500, dim)).astype(F32) + F32(3)
    mean, signs = keys.mean(axis=0), rng.choice([F32(-1), F32(1)], dim)
    codes, scales = encode(keys, mean, signs)
    rotated = ((keys - mean) * signs).astype(float) @ hadamard(dim)
    decoded = (unpacked(codes) - 1.5) * scales[:, None]
    lost = ((decoded - rotated) ** 2).sum(axis=1) / (rotated**2).sum(axis=1)
    assert lost.mean() < 0.13  # a Gaussian loses 0.1188
    levels = unpacked(codes) - 1.5
    best = (levels * rotated).sum(axis=1) / (levels**2).sum(axis=1)
    np.testing.assert_allclose(scales, best, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_cannot_be_quantised_have_the_scale_0_and_harm_no_others(name):
    rng = np.random.default_rng(0)
    keys, mean, signs = head(rng, 40, 64)
    mean[:] = 0
    sound = encode(keys, mean, signs, name)
    bad = {3: NAN, 4: INF, 8: -INF, 21: F32(3e38), 39: NAN}
    for token, value in bad.items():
        keys[token, 5] = value
    keys[30] = 0
    codes, scales = encode(keys, mean, signs, name)
    spoilt = [*bad, 30]
    assert (scales[spoilt] == 0).all()
    assert (codes[spoilt] == 0).all()
    others = np.setdiff1d(np.arange(40), spoilt)
    assert (codes[others] == sound[0][others]).all()
    assert (scales[others] == sound[1][others]).all()
    out = score(keys_of(rng, 3, 64), signs, codes, scales, name)
    assert (out[:, spoilt] == 0).all()
    assert np.isfinite(out).all()


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_scores_are_those_of_numpy(name, dim):
    rng = np.random.default_rng(dim)
    for n, heads in zip(COUNTS, [2, 1, 3, 4, 7, 9], strict=True):
        keys, mean, signs = head(rng, n, dim)
        codes, scales = encode(keys, mean, signs)
        queries = keys_of(rng, heads, dim)
        out = score(queries, signs, codes, scales, name)
        assert (out == scored_by_numpy(queries, signs, codes, scales)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 128, 144, 256, 1024])
def test_scores_of_the_greatest_numbers_do_not_overflow(name, dim):
    signs = np.ones(dim, F32)
    # What becomes all ones when it is rotated, and all minus ones.
    queries = np.outer([1, -1], np.ones(dim) @ hadamard(dim)).astype(F32)
    codes = np.full((40, dim // 4), 0xFF, np.uint8)
    scales = np.ones(40, F32)
    out = score(queries, signs, codes, scales, name)
    assert (out == scored_by_numpy(queries, signs, codes, scales)).all()
    np.testing.assert_allclose(out[0], 1.5 * dim, rtol=1e-5)
    np.testing.assert_allclose(out[1], -1.5 * dim, rtol=1e-5)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_scores_are_nearly_the_dot_products(dim):
    rng = np.random.default_rng(dim)
    keys = rng.standard_normal((2000, dim)).astype(F32)
    mean, signs = keys.mean(axis=0), rng.choice([F32(-1), F32(1)], dim)
    queries = rng.standard_normal((3, dim)).astype(F32)
    out = score(queries, signs, *encode(keys, mean, signs))
    exact = queries @ (keys - mean).T
    for one, other in zip(out, exact, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.92  # sqrt(1 - 0.1188) = 0.939


@pytest.mark.parametrize("name", NAMES)
def test_a_query_that_is_not_finite_scores_0_and_harms_no_others(name):
    rng = np.random.default_rng(0)
    keys, mean, signs = head(rng, 50, 64)
    codes, scales = encode(keys, mean, signs)
    queries = keys_of(rng, 6, 64)
    sound = score(queries, signs, codes, scales, name)
    queries[0, 3], queries[2, 63], queries[3, 0] = NAN, INF, -INF
    queries[4] = 0
    queries[5] = 1e-44
    out = score(queries, signs, codes, scales, name)
    assert (out[[0, 2, 3, 4, 5]] == 0).all()
    assert (out[1] == sound[1]).all()


def test_codes_and_scales_may_be_the_beginning_of_longer_arrays():
    rng = np.random.default_rng(0)
    keys, mean, signs = head(rng, 30, 64)
    codes, scales = np.full((50, 16), 0xEE, np.uint8), np.full(50, 7, F32)
    native.encode(keys[:20], mean, signs, codes[:20], scales[:20])
    native.encode(keys[20:], mean, signs, codes[20:30], scales[20:30])
    together = encode(keys, mean, signs)
    assert (codes[:30] == together[0]).all()
    assert (scales[:30] == together[1]).all()
    assert (codes[30:] == 0xEE).all()
    assert (scales[30:] == 7).all()
    queries = keys_of(rng, 3, 64)
    out = score(queries, signs, codes[:30], scales[:30])
    assert (out == score(queries, signs, *together)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [12, 64, 80, 96, 144])
def test_nothing_behind_the_codes_is_touched(name, dim):
    """The next page cannot be read: one byte too many, and the process ends."""
    page, n = mmap.PAGESIZE, 64
    area = mmap.mmap(-1, 4 * page)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(at + 3 * page), page, 0) == 0
    try:
        nbytes = n * dim // 4
        codes = np.frombuffer(area, np.uint8, nbytes, 3 * page - nbytes).reshape(n, dim // 4)
        out = score(np.ones((3, dim), F32), np.ones(dim, F32), codes, np.ones(n, F32), name)
        assert np.isfinite(out).all()
    finally:
        libc.mprotect(ctypes.c_void_p(at + 3 * page), page, mmap.PROT_READ | mmap.PROT_WRITE)


# -- arguments ------------------------------------------------------------------------------------


def arguments_of_encode():
    return [
        np.zeros((6, 64), F32),
        np.zeros(64, F32),
        np.ones(64, F32),
        np.full((6, 16), 7, np.uint8),
        np.full(6, 7, F32),
    ]


def arguments_of_score():
    return [
        np.zeros((3, 64), F32),
        np.ones(64, F32),
        np.zeros((6, 16), np.uint8),
        np.zeros(6, F32),
        np.full((3, 6), 7, F32),
    ]


def wrong(array):
    """The same array in ways that do not fit: another size, type, order, number of dimensions."""
    yield array[:-1]
    yield np.concatenate([array, array[:1]])
    yield array.astype(float)
    yield np.stack([array, array], axis=-1)[..., 0]
    yield array[None]
    if array.ndim == 2:
        yield np.asfortranarray(array)
        yield np.ascontiguousarray(array[:, :-1])


@pytest.mark.parametrize(
    ("function", "arguments", "written"),
    [(native.encode, arguments_of_encode, (3, 4)), (native.score, arguments_of_score, (4,))],
)
def test_arrays_that_do_not_fit_are_refused_untouched(function, arguments, written):
    function(*arguments())
    for position in range(5):
        for number in range(len(list(wrong(arguments()[position])))):
            given = arguments()
            given[position] = list(wrong(given[position]))[number]
            before = [given[each].copy() for each in written]
            with pytest.raises(ValueError, match=r"\w"):
                function(*given)
            for each, old in zip(written, before, strict=True):
                assert (given[each] == old).all()


@pytest.mark.parametrize("dim", [0, 2, 66, 1028])
def test_heads_of_other_sizes_are_refused(dim):
    with pytest.raises(ValueError, match="multiple of 4"):
        encode(np.zeros((2, dim), F32), np.zeros(dim, F32), np.ones(dim, F32))


def test_what_is_written_must_be_writable():
    out = np.zeros((3, 6), F32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        native.score(*arguments_of_score()[:4], out)
    read_only = arguments_of_score()
    for array in read_only[:4]:
        array.flags.writeable = False
    native.score(*read_only)
    assert (read_only[4] == 0).all()


def test_threads_may_score_at_once():
    rng = np.random.default_rng(0)
    keys, mean, signs = head(rng, 3000, 64)
    codes, scales = encode(keys, mean, signs)
    queries = [keys_of(rng, 3, 64) for _ in range(4)]
    found: list[bytes] = []

    def best(number: int) -> bytes:
        out = score(queries[number], signs, codes, scales)
        maxima, groups = np.empty(750, F32), np.empty(50, np.int64)
        native.softmax_max(out, 4, maxima)
        native.top_groups(maxima, 50, groups)
        return out.tobytes() + groups.tobytes()

    def work(number: int) -> None:
        for _ in range(20):
            found.append(best(number))

    expected = [best(number) for number in range(4)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(expected * 20)
