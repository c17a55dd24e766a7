"""No period has more written than its budget, and what is asked for again is written first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdk_kv.residency.write_budget import Admission, WriteBudget

GIB = 1 << 30
DAY = 86400.0


@pytest.mark.parametrize(
    ("text", "nbytes", "period_s"),
    [
        ("200 GiB/day", 200 * GIB, DAY),
        ("1TiB / week", 1 << 40, 7 * DAY),
        (" 500 MB/Hour ", 500 * 10**6, 3600.0),
    ],
)
def test_a_budget_is_a_size_per_period(text, nbytes, period_s):
    budget = WriteBudget.parse(text)
    assert (budget.nbytes, budget.period_s) == (nbytes, period_s)


@pytest.mark.parametrize("text", ["200 GiB", "/day", "1 GiB/month", "0 B/day", "", 5, "GiB/day"])
def test_anything_else_is_refused_in_words(text):
    with pytest.raises(ValueError, match=r"write budget|byte count"):
        WriteBudget.parse(text)


def test_a_budget_reads_as_it_was_written():
    assert str(WriteBudget.parse("200 GiB/day")) == "200.0 GiB/day"


@given(st.lists(st.tuples(st.floats(0, 3 * DAY), st.integers(1, 4 * GIB)), min_size=1, max_size=60))
def test_no_day_has_more_than_its_budget_and_one_write(asked):
    budget = WriteBudget.parse("20 GiB/day")
    admission = Admission(budget, now_s=0.0)
    now, written, largest = 0.0, 0, 0
    log: list[tuple[float, int]] = []
    for key, (pause, nbytes) in enumerate(asked):
        now += pause
        admission.update(now, written)
        if admission.admits(key, nbytes):
            written += nbytes
            largest = max(largest, nbytes)
            log.append((now, nbytes))
    for begin, _ in log:
        in_a_day = sum(nbytes for at, nbytes in log if begin <= at < begin + DAY)
        assert in_a_day <= budget.nbytes + largest


def test_all_is_written_while_there_is_plenty():
    admission = Admission(WriteBudget.parse("8 GiB/day"), now_s=0.0)
    assert all(admission.admits(key, 1000) for key in range(1000))
    assert admission.declined == 0


def test_when_it_runs_low_what_is_asked_again_is_written():
    budget = WriteBudget.parse("8 GiB/day")  # bursts of 1 GiB
    admission = Admission(budget, now_s=0.0)
    admission.update(0.0, 3 * GIB // 4)
    assert not admission.admits("once", 1000)
    assert not admission.admits("again", 1000)
    assert admission.admits("again", 1000)
    assert not admission.admits("other", 1000)
    assert admission.declined == 3
    # What was written counts from then on; with nothing left, nothing is.
    admission.update(0.0, 5 * GIB // 4)
    assert admission.left_nbytes < 0
    assert not admission.admits("again", 1)
    assert not admission.admits("again", 1)
    # A quarter of a day later there is plenty.
    admission.update(DAY / 4, 5 * GIB // 4)
    assert admission.admits("new", 1000)


def test_what_is_promised_counts():
    admission = Admission(WriteBudget.parse("8 GiB/day"), now_s=0.0)
    assert admission.admits("a", GIB // 8)
    assert not admission.admits("b", GIB // 8, promised_nbytes=GIB)


def test_a_clock_that_is_set_back_gives_nothing():
    admission = Admission(WriteBudget.parse("8 GiB/day"), now_s=1000.0)
    admission.update(1000.0, GIB)
    assert admission.left_nbytes == 0
    admission.update(0.0, GIB)
    assert admission.left_nbytes == 0
    admission.update(DAY / 14, GIB)
    assert admission.left_nbytes == pytest.approx(GIB / 2)


def test_what_was_left_goes_on_and_is_never_more_than_a_burst():
    budget = WriteBudget.parse("8 GiB/day")
    assert Admission(budget, now_s=0.0, left_nbytes=-5.0).left_nbytes == -5.0
    assert Admission(budget, now_s=0.0, left_nbytes=9 * GIB).left_nbytes == GIB


def test_keys_that_were_declined_are_not_remembered_for_ever():
    admission = Admission(WriteBudget.parse("8 GiB/day"), now_s=0.0)
    admission.update(0.0, 3 * GIB // 4)
    for key in range(150_001):
        admission.admits(key, 1000)
    assert not admission.admits(0, 1000)
    assert admission.admits(150_000, 1000)
    assert admission.admits(120_000, 1000)
