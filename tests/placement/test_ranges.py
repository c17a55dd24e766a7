"""A set of bytes as ranges, against a set of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from spdk_kv.placement import Ranges

_RANGE = st.tuples(st.integers(0, 40), st.integers(0, 40))


@given(st.lists(st.tuples(st.booleans(), _RANGE), max_size=30), _RANGE)
def test_it_is_the_set_of_its_bytes(steps, asked):
    ranges, reference = Ranges(), set()
    for adds, (start, end) in steps:
        if adds:
            ranges.add(start, end)
            reference |= set(range(start, end))
        else:
            ranges.remove(start, end)
            reference -= set(range(start, end))
        found = list(ranges)
        assert set().union(*(range(*each) for each in found)) == reference
        assert all(a[1] < b[0] for a, b in pairwise(found))
        assert ranges.nbytes == len(reference)
        assert bool(ranges) == bool(reference)
    wanted = set(range(*asked))
    inside = [offset for each in ranges.within(*asked) for offset in range(*each)]
    outside = [offset for each in ranges.lacking(*asked) for offset in range(*each)]
    assert inside == sorted(wanted & reference)
    assert outside == sorted(wanted - reference)
    end = asked[0]
    while end in reference:
        end += 1
    assert ranges.end_of(asked[0]) == end
    ranges.clear()
    assert not ranges
    assert not ranges.nbytes
