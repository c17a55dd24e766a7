"""``timeout_s`` of a sequence's calls: it ends the wait, and nothing that was accepted before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from link.helpers import Linked, linked_store
from sequence.helpers import Reference, shape_of
from spdk_kv import Sequence
from spdk_kv.errors import DeviceTimeout
from spdk_kv.sequence import writer
from store.helpers import folder_fixture, open_store, reopen
from support.waiting import PATIENCE_S, in_use, wait_until

folder = folder_fixture
SHAPE = shape_of()


@pytest.fixture
def linked(folder: Path) -> Iterator[Linked]:
    with linked_store(folder, "cpu", engine="uring") as found:
        yield found


def calls(sequence: Sequence, **options: Any) -> dict[str, Callable[[], object]]:
    """Each call that may wait, on layer 0."""
    k, v = Reference(SHAPE, seed=99).tokens(3)
    return {
        "append": lambda: sequence.append(0, k, v, **options),
        "append_async": lambda: sequence.append_async(0, k, v, **options).result(PATIENCE_S),
        "settle": lambda: sequence.settle(0, **options),
        "read": lambda: sequence.read(0, **options),
        "read some heads": lambda: sequence.read(0, heads=[1], **options),
        "read_async": lambda: sequence.read_async(0, **options).result(PATIENCE_S),
        "prefetch": lambda: sequence.prefetch([0], **options),
        "truncate": lambda: sequence.truncate(0, layer=0, **options),
        "reorder": lambda: sequence.reorder([1, 0], layer=0, **options),
    }


def test_a_layer_that_another_thread_uses_is_waited_for_no_longer():
    with open_store("ram://", capacity="64 MiB") as store:
        sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
        reference.append(sequence, 300)
        with in_use(sequence._layers[0].lock):
            for call in calls(sequence, timeout_s=0.02).values():
                with pytest.raises(DeviceTimeout, match="only the wait for it ended"):
                    call()
            with pytest.raises(DeviceTimeout):
                store.flush(timeout_s=0.02)
            reference.check_layer(sequence, 1)  # the other layer goes on
        # A reordering that had begun is done before anything else.
        k, v = reference.layers[0]
        reference.layers[0] = k.flip(0), v.flip(0)
        reference.check(sequence)
        store.flush(timeout_s=PATIENCE_S)


def test_what_a_whole_sequence_waits_for_is_waited_for_no_longer():
    with open_store("ram://", capacity="64 MiB") as store:
        sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
        reference.append(sequence, 300)
        with in_use(sequence._whole._lock), pytest.raises(DeviceTimeout):
            sequence.reorder([1, 0], timeout_s=0.02)
        with in_use(store.paths.ahead.lock), pytest.raises(DeviceTimeout):
            sequence.prefetch([0], timeout_s=0.02)
        with in_use(sequence._recorder.lock), pytest.raises(DeviceTimeout):
            sequence.truncate(5, timeout_s=0.02)
        reference.check(sequence)
        reference.reorder(sequence, [1, 0])
        reference.check(sequence)


def test_writes_that_are_waited_for_no_longer_are_done(folder):
    with linked_store(folder, "cpu", engine="uring") as linked:
        sequence, reference = _waited_for_no_longer(linked)
        reference.check(sequence)
    with reopen(folder) as again:
        reference.check(again.sequence("s"))


def _waited_for_no_longer(linked: Linked) -> tuple[Sequence, Reference]:
    store = linked.store
    sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 10)
    store.flush()
    linked.link.pause()
    reference.append(sequence, 300)
    for wait in (
        lambda: sequence.settle(0, timeout_s=0.03),
        lambda: sequence.truncate(305, timeout_s=0.03),
        lambda: store.flush(timeout_s=0.03),
    ):
        with pytest.raises(DeviceTimeout):
            wait()
    assert [sequence.tokens(layer) for layer in range(2)] == [310, 310]
    linked.link.resume()
    for layer in range(2):
        sequence.settle(layer, timeout_s=PATIENCE_S)
    reference.check(sequence)
    reference.append(sequence, 20)
    store.flush(timeout_s=PATIENCE_S)
    return sequence, reference


def test_a_read_that_is_given_up_is_done_by_the_next(linked):
    sequence, reference = linked.store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 300)
    for layer in range(2):
        sequence.settle(layer)
    for prefetched in (False, True):
        linked.link.pause()
        if prefetched:
            sequence.prefetch([0])
        with pytest.raises(DeviceTimeout, match="read on"):
            sequence.read(0, device="cpu", timeout_s=0.03)
        with pytest.raises(DeviceTimeout, match="read on"):
            sequence.read(0, device="cpu", heads=[1], timeout_s=0.03)
        linked.link.resume()
        reference.check(sequence, device="cpu")
    assert linked.store.paths.ahead.held_nbytes == 0


def test_a_long_append_that_takes_too_long_appends_nothing(linked, monkeypatch):
    monkeypatch.setattr(writer, "_MOST_PENDING_NBYTES", 32 << 10)
    monkeypatch.setattr(writer, "_SLICE_NBYTES", 32 << 10)
    sequence, reference = linked.store.sequence("s", SHAPE), Reference(SHAPE)
    reference.append(sequence, 100)
    linked.link.pause()
    # From a GPU all of it is one slice, so that the second append meets what is pending.
    layer = sequence._layers[0]
    k, v = Reference(SHAPE, seed=9).tokens(300)
    reference.append(sequence, 150, layer=0)
    linked.store.links = type(linked.store.links)((), lambda device: (None, "unlinked"))
    with pytest.raises(DeviceTimeout, match="writing"):
        sequence.append(0, k, v, timeout_s=0.05)
    assert sequence.tokens(0) == 250
    assert layer.is_writing
    linked.link.resume()
    reference.check(sequence)
    reference.append(sequence, 120)
    reference.check(sequence)
    linked.store.flush()
    reference.check(sequence)


def test_nothing_is_written_where_a_cancelled_write_may_still_land(linked):
    sequence, reference = linked.store.sequence("s", SHAPE), Reference(SHAPE)
    linked.link.pause()
    reference.append(sequence, 300, layer=0)
    wait_until(lambda: linked.link.stats()["copies"])
    reference.truncate(sequence, 0, layer=0)
    k, v = Reference(SHAPE, seed=9).tokens(200)
    with pytest.raises(DeviceTimeout, match="what was being written of"):
        sequence.append(0, k, v, timeout_s=0.03)
    assert sequence.tokens(0) == 0
    linked.link.resume()
    reference.append(sequence, 200, layer=0)
    sequence.settle(0)
    reference.check(sequence)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_is_a_positive_number(timeout_s):
    with open_store("ram://", capacity="64 MiB") as store:
        sequence = store.sequence("s", SHAPE)
        for call in calls(sequence, timeout_s=timeout_s).values():
            with pytest.raises(ValueError, match="positive"):
                call()


def test_no_rows_change_while_a_record_is_made():
    # It would have the note from before, which says what each row is, and rows from after it.
    with open_store("ram://", capacity="64 MiB") as store:
        sequence, reference = store.sequence("s", SHAPE), Reference(SHAPE)
        reference.append(sequence, 300)
        with in_use(sequence._recorder.lock):
            with pytest.raises(DeviceTimeout):
                sequence.reorder([1, 0], timeout_s=0.02)
            reference.check(sequence)
        reference.reorder(sequence, [1, 0])
        reference.check(sequence)
