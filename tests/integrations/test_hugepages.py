"""A host's memory is moved onto huge pages with its bytes unchanged, once, and where it can be."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from spdk_kv.integrations import hugepages
from spdk_kv.integrations.hugepages import NBYTES, HugePages


@pytest.fixture
def huge() -> HugePages:
    if not hugepages.is_enabled():
        pytest.skip("this system has no transparent huge pages, or turned them off")
    return HugePages()


def small_pages(nbytes: int) -> np.ndarray:
    """Noise on ordinary pages, of a mapping with its own pages of 2 MiB in the middle."""
    mapped = mmap.mmap(-1, nbytes + 2 * NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapped, np.uint8)
    for at in range(0, whole.nbytes, 4096):  # one after the other, as a host does it
        whole[at] = 1
    start = -whole.ctypes.data % NBYTES
    array = whole[start : start + nbytes]
    array[:] = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    return array


def on_huge_pages(array: np.ndarray) -> int:
    """Bytes of the mapping around ``array`` that lie on huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= array.ctypes.data < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def test_pages_lie_on_huge_pages_afterwards_with_their_bytes(huge):
    array = small_pages(8 * NBYTES)
    before = array.tobytes()
    if on_huge_pages(array):
        pytest.skip("this system gives out huge pages without being asked")
    # Two pages of KV cache side by side, across a border of huge pages.
    huge.back([array[: NBYTES + 5000], array[NBYTES + 5000 : 3 * NBYTES]])
    if not on_huge_pages(array):
        pytest.skip("this kernel moves nothing onto huge pages: it is older than 6.1, or short")
    assert on_huge_pages(array) == 3 * NBYTES
    assert array.tobytes() == before
    assert huge.moved == 3 * NBYTES


def test_each_place_is_asked_for_once(huge, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(huge, "_madvise", lambda at, nbytes, how: asked.append(at) or 0)
    array = small_pages(2 * NBYTES)
    for _ in range(3):
        huge.back([array, array[4096:]])
    assert asked == [array.ctypes.data, array.ctypes.data + NBYTES]


def test_what_is_small_stays_where_it_is(huge, monkeypatch):
    monkeypatch.setattr(huge, "_madvise", lambda *_: pytest.fail("asked for a small page"))
    huge.back([np.zeros(hugepages.LEAST_NBYTES - 1, np.uint8), np.empty(0, np.uint8)])


def test_a_kernel_that_refuses_is_not_asked_for_ever(huge, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(huge, "_madvise", lambda at, nbytes, how: asked.append(at) or -1)
    huge.back([small_pages(20 * NBYTES)])
    assert len(asked) == 8


def test_where_they_are_turned_off_nobody_is_asked(tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(hugepages, "_ENABLED", tmp_path / "enabled")
    turned_off = HugePages()
    monkeypatch.setattr(turned_off, "_madvise", lambda *_: pytest.fail("asked all the same"))
    turned_off.back([small_pages(NBYTES)])
