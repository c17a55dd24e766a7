"""Ctrl-C amid a pass of the model: crop(0) brings the cache back to the tokens before it."""

from __future__ import annotations

import pytest
import torch

from spdk_kv.integrations.transformers.stream import LayerStream, StreamOptions
from spdk_kv.store import KVStore
from support.interrupts import interrupted_everywhere
from support.rounds import rounds

# An interrupt may come within a finalizer, where Python reports it and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LAYERS, PAST, NEW = 4, 90, 40


def stream_of(store: KVStore, resident: int, window: int | None = None) -> LayerStream:
    windows = (None, window, None, window)
    return LayerStream(store, StreamOptions(windows, 400, resident, None, "layer"))


def tokens(layer: int, first: int, count: int, batch: int = 2) -> torch.Tensor:
    """K of these tokens, each with numbers of its own; V is its negative."""
    rows = torch.arange(first, first + count).view(1, 1, count, 1)
    return (
        (rows + 1000 * layer + 5000 * torch.arange(batch).view(batch, 1, 1, 1))
        .expand(batch, 2, count, 64)
        .float()
    )


def run_pass(stream: LayerStream, first: int, count: int) -> None:
    """A pass of the model over ``count`` tokens, with what its attention sees checked."""
    for layer in range(LAYERS):
        k = tokens(layer, first, count)
        keys, values = stream.update(layer, k, -k)
        window = stream.options.windows[layer]
        begin = 0 if window is None else max(0, first - window + 1)
        wanted = tokens(layer, begin, first + count - begin)
        assert torch.equal(keys, wanted)
        assert torch.equal(values, -wanted)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("resident", [1, 2, 3, 4])
def test_a_pass_interrupted_anywhere_is_taken_back_by_crop(store, resident, window):
    stream = stream_of(store, resident, window)

    def prepare(at: int) -> None:
        stream.clear()
        run_pass(stream, 0, PAST)

    def check(at: int) -> None:
        stream.truncate(0)
        if stream.tokens(0) == PAST + NEW:
            stream.truncate(NEW)
        assert [stream.tokens(layer) for layer in range(LAYERS)] == [PAST] * LAYERS
        run_pass(stream, PAST, NEW)
        run_pass(stream, PAST + NEW, 1)

    interrupted_everywhere(
        prepare, lambda at: run_pass(stream, PAST, NEW), check, step=rounds(97, 11)
    )
    stream.release()


def test_a_crop_interrupted_anywhere_can_be_done_again(store):
    stream = stream_of(store, 3)

    def prepare(at: int) -> None:
        stream.clear()
        run_pass(stream, 0, PAST)
        run_pass(stream, PAST, NEW)

    def check(at: int) -> None:
        if stream.tokens(0) > PAST:
            stream.truncate(NEW)
        stream.truncate(0)
        assert [stream.tokens(layer) for layer in range(LAYERS)] == [PAST] * LAYERS
        run_pass(stream, PAST, 5)

    interrupted_everywhere(prepare, lambda at: stream.truncate(NEW), check, step=rounds(23, 3))


def test_after_an_interrupted_first_pass_or_change_of_the_batch_it_begins_anew(store):
    stream = stream_of(store, 2)

    def prepare(at: int) -> None:
        stream.clear()

    def change(at: int) -> None:
        run_pass(stream, 0, PAST)
        stream.select([0, 1, 0])

    def check(at: int) -> None:
        stream.clear()
        run_pass(stream, 0, 5)

    interrupted_everywhere(prepare, change, check, step=rounds(149, 17))
