"""Jobs between a host's memory and a store: each ends once, and nobody waits."""

from __future__ import annotations

import os
import threading
import traceback

import numpy as np
import pytest

import spdk_kv
from spdk_kv.integrations.jobs import Finished, Jobs
from spdk_kv.integrations.pages import put_pages
from support.subprocesses import run_script
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
    assert sorted(store.keys()) == ["a", "b"]


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


def test_no_buffer_is_held_by_what_is_logged_of_a_failure(store, jobs, monkeypatch, caplog):
    def run(*_):
        raise spdk_kv.errors.DeviceGone("it was pulled out")

    monkeypatch.setattr(store.engine, "run", run)
    page, place = content(1), bytearray(NBYTES)
    monkeypatch.setattr(store, "sizes", lambda keys: [NBYTES for _ in keys])
    jobs.put([("a", page)])
    jobs.get([("a", place)])
    assert [end.ok for end in all_of(jobs, 2).values()] == [[False]] * 2
    # As by handlers that pass records on, or write them later.
    assert len(caplog.records) == 2
    page.append(0)
    place.append(0)


class Torn(list):
    """Pages that cannot be looked at."""

    def __iter__(self):
        raise IndexError("no such row")


def test_pages_that_cannot_be_looked_at_end_their_job_and_no_worker(store, jobs):
    for _ in range(3):
        numbers = jobs.put(Torn([("a", b"x")])), jobs.get(Torn([("a", bytearray(1))]))
        ends = all_of(jobs, 2)
        assert [ends[number].ok for number in numbers] == [[False]] * 2
        assert all("no such row" in (end.error or "") for end in ends.values())


def test_pages_of_a_job_that_is_not_begun_are_not_looked_at(store):
    jobs = Jobs(store, workers=2, most_pending=1)
    with in_use(store._records.lock):
        first, declined = jobs.put([("a", b"x")]), jobs.put(Torn([("a", b"x")]))
        assert [end.job for end in jobs.finished()] == [declined]
        wait_until(lambda: jobs._begun)
        jobs._most_pending = None
        second = jobs.put(Torn([("a", b"x")]))
        closer = threading.Thread(target=jobs.close)
        closer.start()
        wait_until(lambda: not jobs._puts)
    closer.join(PATIENCE_S)
    assert [(end.job, end.ok) for end in jobs.finished()] == [(second, [False]), (first, [True])]


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


@pytest.mark.parametrize("what", ["closing", "draining"])
def test_who_waits_for_a_drive_says_what_for(store, jobs, what, monkeypatch, caplog):
    monkeypatch.setattr("spdk_kv.integrations.waits._SAID_AFTER_S", 0.001)
    monkeypatch.setattr("spdk_kv.integrations.waits._SAID_EVERY_S", 0.001)
    page = content(1)
    with in_use(store._records.lock):
        jobs.put([("a", page), ("b", page)])
        wait_until(lambda: jobs._begun)
        waiter = threading.Thread(target=jobs.close if what == "closing" else jobs.drain)
        waiter.start()
        # More than once: who looks later is told as well.
        wait_until(lambda: caplog.text.count(f"{what} waits for the drive of {store.location}") > 2)
        assert "1 jobs, the first a put of 2 pages" in caplog.text
        with pytest.raises(BufferError):
            page.append(0)  # the drive may still read it
    waiter.join(PATIENCE_S)
    assert [end.ok for end in jobs.finished()] == [[True, True]]
    page.append(0)


def test_a_drain_ends_with_the_last_job(store, jobs):
    jobs.drain()
    numbers = [jobs.put([(f"k{number}", content(number))]) for number in range(20)]
    jobs.drain()
    assert sorted(end.job for end in jobs.finished()) == numbers
    assert not jobs._drains


def test_what_a_reader_has_to_look_up_waits_for_nobody(store, tmp_path):
    put_pages(store, [("a", content(1))])
    store.flush()
    with spdk_kv.open(f"file://{tmp_path}/store", read_only=True) as reader:
        jobs = Jobs(reader, workers=2)
        put_pages(store, [("b", content(2))])
        store.flush()
        with in_use(reader.catalog.records.lock):
            number = jobs.exists(["a", "b", "x"])
            assert jobs.finished() == []
        assert all_of(jobs, 1)[number].ok == [True, True, False]
        jobs.close()


def test_a_fork_has_no_jobs_and_touches_nothing_of_its_parents(store):
    told: list[int] = []
    jobs = Jobs(store, workers=2, on_finished=lambda: told.append(os.getpid()))
    with in_use(store._records.lock):
        for number in range(3):
            jobs.put([("k", content(number))])
        pid = os.fork()
        if not pid:
            try:
                for ask in (jobs.put, jobs.get, jobs.exists):
                    with pytest.raises(spdk_kv.ClosedError, match="fork"):
                        ask([])
                jobs.close()
                assert (jobs.finished(), told) == ([], [])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    assert all(end.ok == [True] for end in all_of(jobs, 3).values())
    jobs.close()
    assert told == [os.getpid()] * 3


def test_where_a_thread_is_refused_none_is_left_behind(store, monkeypatch):
    start, begun = threading.Thread.start, []

    def refused(thread):
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)
        begun.append(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="new thread"):
        Jobs(store)
    assert not any(thread.is_alive() for thread in begun)


def test_a_program_may_end_amid_jobs(tmp_path):
    """As by a host that dies of something else, and closes nothing."""
    run_script(f"""
        import logging
        import numpy as np
        import spdk_kv
        from spdk_kv.integrations.jobs import Jobs
        logging.disable()  # of those that were not stored any more
        store = spdk_kv.open("file://{tmp_path}/left", capacity="64 MiB")
        jobs = Jobs(store)
        for number in range(24):
            jobs.put([(str(number), np.random.default_rng(number).bytes(1 << 20))])
            jobs.get([(str(number // 2), bytearray(1 << 20))])
        assert jobs.pending
    """)
    with spdk_kv.open(f"file://{tmp_path}/left") as store:
        left = store.keys()
        for key in left:
            assert store.get(key, as_numpy=True).tobytes() == content(int(key), 1 << 20)
