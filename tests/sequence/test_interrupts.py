"""Ctrl-C amid the calls of a sequence ends the call, and leaves each layer as it was before it or
as it was to be; what was accepted before is written."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import spdk_kv
from link.helpers import linked_store
from sequence.helpers import Reference, begun, shape_of
from spdk_kv.sequence import writer as sequence_writer
from store.helpers import folder_fixture, open_store, reopen
from support.interrupts import interrupted_everywhere
from support.rounds import rounds

# An interrupt may come within a finalizer, where Python reports it and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

folder = folder_fixture
# Rows of 240 bytes in chunks of 16 KiB: 150 tokens fill chunks, and leave a tail.
BEFORE, MORE = 150, 200


@contextmanager
def ctrl_c(seconds: float) -> Iterator[None]:
    """A KeyboardInterrupt after ``seconds``, which must come within the block."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - wherever it comes from now on
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def same_or_changed(
    sequence: spdk_kv.Sequence, before: Reference, after: Reference, layers: int = 2
) -> None:
    """Every layer has exactly the tokens of ``before`` or those of ``after``."""
    for layer in range(layers):
        counts = [each.layers[layer][0].shape[2] for each in (before, after)]
        assert sequence.tokens(layer) in counts
        if sequence.tokens(layer) == counts[1]:
            after.check_layer(sequence, layer)
        else:
            before.check_layer(sequence, layer)


class Twice:
    """A sequence, and what it holds before and after a change."""

    def __init__(self, folder: Path, granularity: str) -> None:
        self.folder, self.granularity = folder, granularity
        self.shape = shape_of(max_tokens=1000)
        self.store = open_store(folder, engine="pagecache", capacity="16 MiB")
        self.before, self.after = Reference(self.shape), Reference(self.shape)
        self.sequence: Any = None

    def begin(self, number: int) -> None:
        """A new sequence with 150 tokens, flushed every second time."""
        if self.sequence is not None:
            self.sequence.delete()
        self.sequence = self.store.sequence("s", self.shape, granularity=self.granularity)
        self.before, self.after = Reference(self.shape), Reference(self.shape)
        self.before.append(self.sequence, BEFORE)
        self.after.layers = list(self.before.layers)
        if number % 2:
            self.store.flush()

    def changed(self, change: Callable[[Reference, spdk_kv.Sequence], None]) -> None:
        """What ``change`` would do is what ``after`` is."""
        with open_store("ram://", capacity="16 MiB") as other:
            twin = other.sequence("s", self.shape)
            for layer, (k, v) in enumerate(self.before.layers):
                twin.append(layer, k, v)
            change(self.after, twin)

    def check(self, number: int) -> None:
        """It is one or the other, can be changed further, and lasts."""
        same_or_changed(self.sequence, self.before, self.after)
        lengths = [self.sequence.tokens(layer) for layer in range(2)]
        self.sequence.truncate(min(100, *lengths))
        goal = Reference(self.shape, seed=7777)
        goal.layers = [(a[:, :, :100], b[:, :, :100]) for a, b in self.after.layers]
        goal.check(self.sequence)
        goal.append(self.sequence, 333)
        goal.check(self.sequence)
        self.store.flush()
        if number % 8 == 0:
            self.store.close()
            self.store = reopen(self.folder, engine="pagecache")
            self.sequence = self.store.sequence("s")
        goal.check(self.sequence)


@pytest.fixture(params=["layer", "head", "token"])
def twice(request, folder) -> Iterator[Twice]:
    found = Twice(folder, request.param)
    yield found
    found.store.close()


def everywhere(twice: Twice, call: Callable[[], None], change: Any) -> None:
    def prepare(number: int) -> None:
        twice.begin(number)
        twice.changed(change)

    interrupted_everywhere(prepare, lambda at: call(), twice.check, step=rounds(19, 2))


def test_ctrl_c_anywhere_in_an_append(twice, monkeypatch):
    monkeypatch.setattr(sequence_writer, "_SLICE_NBYTES", 64 << 10)  # three slices
    monkeypatch.setattr(sequence_writer, "_MOST_PENDING_NBYTES", 64 << 10)
    tokens = Reference(twice.shape, seed=500).tokens(MORE)

    def call() -> None:
        for layer in range(2):
            twice.sequence.append(layer, *tokens)

    def change(reference: Reference, twin: spdk_kv.Sequence) -> None:
        for layer in range(2):
            k, v = reference.layers[layer]
            reference.layers[layer] = tuple(
                torch.cat([old.view(torch.uint8), new.view(torch.uint8)], 2).view(old.dtype)
                for old, new in zip((k, v), tokens, strict=True)
            )

    everywhere(twice, call, change)


def test_ctrl_c_anywhere_in_a_truncation(twice):
    everywhere(
        twice,
        lambda: twice.sequence.truncate(101),
        lambda reference, twin: reference.truncate(twin, 101),
    )


def test_ctrl_c_anywhere_in_a_flush_or_a_read(twice):
    def call() -> None:
        twice.store.flush()
        twice.sequence.prefetch([1, 0])
        twice.sequence.read(0)
        twice.sequence.read(1)

    everywhere(twice, call, lambda reference, twin: None)


def test_a_flush_after_one_that_was_interrupted_anywhere_makes_all_last(twice):
    def check(number: int) -> None:
        twice.store.flush()
        twice.store.close()
        twice.store = reopen(twice.folder, engine="pagecache")
        twice.sequence = twice.store.sequence("s")
        twice.before.check(twice.sequence)

    interrupted_everywhere(
        lambda number: twice.begin(0), lambda at: twice.store.flush(), check, step=rounds(29, 1)
    )


def test_a_reordering_that_was_interrupted_is_done_in_all_layers_or_in_none(folder):
    with open_store("ram://", capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [BEFORE])
        swapped = [0]

        def check(at: int) -> None:
            found = [sequence.read(layer)[0] for layer in range(2)]
            wanted = [layers[0] for layers in reference.layers]
            flipped = [layers[0][[1, 0]] for layers in reference.layers]
            as_it_was = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
            reordered = [torch.equal(a, b) for a, b in zip(found, flipped, strict=True)]
            assert all(as_it_was) or all(reordered)
            if all(reordered):
                swapped[0] += 1
                sequence.reorder([1, 0])

        reference.layers = [
            (k.view(torch.uint8).float(), v.view(torch.uint8).float()) for k, v in reference.layers
        ]
        read = sequence.read
        sequence.read = lambda layer: tuple(each.view(torch.uint8).float() for each in read(layer))
        interrupted_everywhere(lambda at: None, lambda at: sequence.reorder([1, 0]), check)
        assert swapped[0] > 3, "one that has begun is finished"


def test_ctrl_c_while_writes_are_waited_for_cancels_none(folder):
    with linked_store(folder, "cpu", engine="uring") as linked:
        shape = shape_of(layers=1)
        sequence, reference = linked.store.sequence("s", shape), Reference(shape)
        reference.append(sequence, 100)
        linked.store.flush()
        linked.link.pause()
        reference.append(sequence, 300)
        for wait in (
            lambda: sequence.settle(0),
            linked.store.flush,
            lambda: sequence.truncate(399),
        ):
            with ctrl_c(0.05):
                wait()
        linked.link.resume()
        sequence.settle(0)
        reference.check(sequence)
        reference.append(sequence, 50)
        linked.store.flush()
        reference.check(sequence)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))


def test_ctrl_c_while_an_append_waits_for_room_appends_nothing(folder, monkeypatch):
    with linked_store(folder, "cpu", engine="uring") as linked:
        sequence, reference = begun(linked.store, "layer", [10])
        backlog = linked.store.paths.backlog
        linked.link.pause()
        reference.append(sequence, 300, layer=0)
        monkeypatch.setattr(backlog, "_limit_nbytes", 1 << 10)
        with ctrl_c(0.05):
            sequence.append(1, *reference.tokens(5))
        assert sequence.tokens(1) == 10
        linked.link.resume()
        reference.append(sequence, 5, layer=1)
        reference.check(sequence)
