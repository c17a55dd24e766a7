"""A sequence that can't be recorded keeps nobody else's changes back, and is reported once."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import spdk_kv
from sequence.helpers import Reference, shape_of
from spdk_kv.errors import DeviceError
from spdk_kv.store import KVStore, background
from spdk_kv.store.sequences import report
from store.helpers import check_books, folder_fixture, open_store, payload, reopen
from support.waiting import PATIENCE_S

folder = folder_fixture
# One layer's write of this many tokens has whole chunks; of FEW, it stays in memory until a flush.
MANY, FEW = 300, 3
LIMIT_NBYTES = 6 << 20


@contextmanager
def no_writes_beyond_the_limit() -> Iterator[None]:
    """The kernel refuses writes behind the first 6 MiB of a file (EFBIG), as a drive with a bad
    region refuses those to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_NBYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def begun_beyond(folder: Path, *names: str) -> tuple[KVStore, list[spdk_kv.Sequence]]:
    """A store, and sequences in it: the first one below the limit, the others behind it."""
    store = open_store(folder, engine="threads", capacity="24 MiB")
    sequences = [store.sequence("fine", shape_of())]
    store.put("filler", payload("filler", 1, LIMIT_NBYTES))
    sequences += [store.sequence(name, shape_of()) for name in names]
    store.flush()
    return store, sequences


def test_one_lost_sequence_is_named_once_and_everything_else_is_safe(folder):
    store, (fine, lost) = begun_beyond(folder, "lost")
    reference = Reference(shape_of())
    reference.append(fine, MANY)
    with no_writes_beyond_the_limit():
        Reference(shape_of()).append(lost, MANY)
        store.delete("filler")
        with pytest.raises(DeviceError, match="sequence 'lost' could not be recorded") as caught:
            store.flush()
        assert "fine" not in str(caught.value)
        assert caught.value.op == "write"
    for _ in range(3):
        store.flush()
        store.flush_async().result(PATIENCE_S)
        for call in (lambda: lost.read(0), lambda: lost.settle(0)):  # who owns it still hears of it
            with pytest.raises(DeviceError):
                call()
    reference.append(fine, FEW)
    store.close()
    with reopen(folder) as store:
        reference.check(store.sequence("fine"))
        assert store.sequence("lost").tokens(0) == 0  # as it was when it was last recorded
        assert "filler" not in store
        check_books(store)


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more")])
def test_the_first_five_that_were_lost_are_named(count, more):
    lost = [
        (SimpleNamespace(name=str(number), is_news=lambda *_: True), DeviceError("as if"))
        for number in range(count)
    ]
    with pytest.raises(DeviceError, match=f"'3', '4'{more} could not be recorded"):
        report(lost, "flush")


def test_one_error_names_all_that_were_lost_since_the_last(folder):
    store, (_, *lost) = begun_beyond(folder, "one", "two", "three")
    with store:
        with no_writes_beyond_the_limit():
            for sequence in lost[:2]:
                Reference(shape_of()).append(sequence, MANY)
            with pytest.raises(DeviceError, match="sequence 'one', 'two' could not"):
                store.flush()
            store.flush()
            Reference(shape_of()).append(lost[2], MANY)
            with pytest.raises(DeviceError, match="sequence 'three' could not"):
                store.flush()
        store.flush()
        lost[0].delete()
        assert store.sequence("one", shape_of()).tokens(0) == 0
        store.flush()


def test_a_flush_that_may_succeed_later_is_tried_and_reported_each_time(folder):
    store, (_, late) = begun_beyond(folder, "late")
    reference = Reference(shape_of())
    reference.append(late, FEW)
    with no_writes_beyond_the_limit():
        for _ in range(2):
            with pytest.raises(DeviceError, match="sequence 'late' could not"):
                store.flush()
    store.flush()
    store.close()
    with reopen(folder) as store:
        reference.check(store.sequence("late"))


def test_the_background_logs_it_once_and_leaves_the_report_to_flush(folder, caplog):
    store, (fine, lost) = begun_beyond(folder, "lost")
    reference = Reference(shape_of())
    with store:
        with no_writes_beyond_the_limit():
            Reference(shape_of()).append(lost, MANY)
            with caplog.at_level(logging.ERROR, "spdk_kv"):
                for _ in range(3):
                    reference.append(fine, FEW)
                    background._flush(store)
                    assert not fine.dirty
        assert len([line for line in caplog.messages if "background flush" in line]) == 1
        with pytest.raises(DeviceError, match="'lost'"):
            store.flush()
        store.flush()
    with reopen(folder) as store:
        reference.check(store.sequence("fine"))


@pytest.mark.parametrize("flushed", [False, True])
def test_close_reports_what_no_flush_has(folder, flushed):
    store, (fine, lost) = begun_beyond(folder, "lost")
    reference = Reference(shape_of())
    reference.append(fine, FEW)
    with no_writes_beyond_the_limit():
        Reference(shape_of()).append(lost, MANY)
        for close in [store.flush, store.close][not flushed :][:1]:
            with pytest.raises(DeviceError, match="'lost'"):
                close()
    store.close()
    with reopen(folder) as store:
        reference.check(store.sequence("fine"))
