"""Jobs between a host's memory and a store: each ends once, and nobody waits."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import spdk_kv
from spdk_kv.integrations.jobs import Finished, Jobs
from spdk_kv.integrations.pages import put_pages
from support.waiting import PATIENCE_S, in_use, wait_until

NBYTES = 10_000  # no multiple of a block


@pytest.fixture
def store(tmp_path):
    with spdk_kv.open(f"file://{tmp_path}/store", capacity="4 MiB") as store:
        yield store


@pytest.fixture
def jobs(store):
    jobs = Jobs(store, workers=2)
    yield jobs
    jobs.close()


def content(number: int, nbytes: int = NBYTES) -> bytearray:
    return bytearray(np.random.default_rng(number).bytes(nbytes))


def all_of(jobs: Jobs, count: int) -> dict[int, Finished]:
    """The ends of ``count`` jobs, by their numbers."""
    ended: list[Finished] = []

    def enough() -> bool:
        ended.extend(jobs.finished())
        return len(ended) >= count

    wait_until(enough)
    assert len({end.job for end in ended}) == len(ended) == count
    return {end.job: end for end in ended}


def test_nobody_waits_for_a_store_that_is_stuck(store):
    told: list[int] = []
    jobs = Jobs(store, workers=2, most_pending=8, on_finished=lambda: told.append(1))
    with in_use(store._records.lock):
        puts = [jobs.put([(f"k{number}", content(number))]) for number in range(8)]
        reads = [jobs.get([("k0", bytearray(NBYTES))]) for _ in range(2)]
        # Writes beyond the limit are declined, reads never.
        declined = jobs.put([("k8", content(8))])
        ended = jobs.finished()
        assert [(end.job, end.ok, end.error) for end in ended] == [
            (declined, [False], "8 jobs are waiting")
        ]
        assert jobs.pending == 10
    ends = all_of(jobs, 10)
    assert all(ends[job].ok == [True] and ends[job].nbytes == NBYTES for job in puts)
    assert set(reads) < set(ends)
    jobs.close()
    assert len(told) == 11
    assert "k8" not in store


def test_writes_leave_a_worker_to_reads(store, jobs):
    put_pages(store, [("a", content(1))])
    place = bytearray(NBYTES)
    with in_use(store._records.lock):
        first, second = (jobs.put([(key, content(2))]) for key in "bc")
        read = jobs.get([("a", place)])
        wait_until(lambda: (len(jobs._gets), len(jobs._puts)) == (0, 1))
        closer = threading.Thread(target=jobs.close)
        closer.start()
        # What was begun goes on, and what was not has failed.
        wait_until(lambda: not jobs._puts)
    closer.join(PATIENCE_S)
    ends = {end.job: end for end in jobs.finished()}
    assert (ends[first].ok, ends[read].ok) == ([True], [True])
    assert ends[second].ok == [False]
    assert ends[second].error is not None
    assert place == content(1)
    assert store.keys() == ["a", "b"]


def test_what_is_known_is_answered_at_once(store, jobs):
    put_pages(store, [("a", content(1)), ("b", content(2))])
    exists = jobs.exists(["a", "x", "b"])
    delete = jobs.delete(["a", "x"])
    first, second = jobs.finished()
    assert (first.job, first.ok, second.job, second.ok) == (
        *(exists, [True, False, True]),
        *(delete, [True, False]),
    )
    assert store.keys() == ["b"]


def test_no_buffer_is_held_after_the_end(store, jobs):
    page, place = content(1), bytearray(NBYTES)
    jobs.put([("a", page)])
    assert all_of(jobs, 1)
    jobs.get([("a", place)])
    assert all_of(jobs, 1)
    jobs.close()
    # Refused while something holds an export.
    page.append(0)
    place.append(0)


def test_a_buffer_that_is_none_ends_its_job_and_no_other(store, jobs, caplog):
    bad = jobs.put([("a", object())])
    good = jobs.put([("b", content(2))])
    ends = all_of(jobs, 2)
    assert ends[bad].ok == [False]
    assert "TypeError" in (ends[bad].error or "")
    assert ends[good].ok == [True]


def test_every_job_ends_once_whoever_closes_meanwhile(store):
    for _ in range(20):
        jobs = Jobs(store, workers=3)
        taken: list[list[int]] = [[], [], []]

        def submit(numbers: list[int], jobs: Jobs = jobs) -> None:
            page = bytearray(100)
            try:
                while True:
                    numbers.append(jobs.put([("k", page)]))
                    numbers.append(jobs.get([("k", bytearray(100))]))
            except spdk_kv.ClosedError:
                pass

        threads = [threading.Thread(target=submit, args=(numbers,)) for numbers in taken]
        for thread in threads:
            thread.start()
        wait_until(lambda taken=taken: all(len(numbers) > 5 for numbers in taken))
        jobs.close()
        for thread in threads:
            thread.join(PATIENCE_S)
        ended = [end.job for end in jobs.finished()]
        assert sorted(ended) == sorted(number for numbers in taken for number in numbers)
        assert jobs.pending == 0


def test_nothing_is_taken_after_close(store):
    jobs = Jobs(store)
    jobs.close()
    jobs.close()
    for ask in (lambda: jobs.put([]), lambda: jobs.get([]), lambda: jobs.exists([])):
        with pytest.raises(spdk_kv.ClosedError):
            ask()


def test_a_closed_store_fails_jobs_and_hangs_none(tmp_path):
    store = spdk_kv.open(f"file://{tmp_path}/other")
    jobs = Jobs(store)
    store.close()
    numbers = [jobs.put([("a", content(1))]), jobs.get([("a", bytearray(5))]), jobs.exists(["a"])]
    ends = all_of(jobs, 3)
    assert [ends[number].ok for number in numbers] == [[False]] * 3
    jobs.close()
