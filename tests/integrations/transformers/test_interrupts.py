"""Ctrl-C amid a pass of the model: crop(0) brings the cache back to the tokens before it."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from transformers import Lfm2Config

from integrations.transformers.families.tiny import shrunk
from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.transformers import OffloadedKVCache
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


@pytest.mark.parametrize("change", ["crop", "select", "reset", "pass"])
def test_states_and_kv_of_one_token_whatever_is_interrupted(store, change):
    """A convolution's state is the newest columns; they must be those of the K/V's last tokens."""
    config = shrunk(Lfm2Config, {"layer_types": ["conv", "full_attention", "conv", "conv"]})
    cache = OffloadedKVCache(store, config)

    def step(past: int, count: int, batch: int = 2) -> None:
        at = torch.arange(past, past + count, dtype=torch.float32)
        for layer in range(4):
            if layer == 1:
                kv = at.reshape(1, 1, count, 1).expand(batch, 2, count, 16).contiguous()
                cache.update(kv, -kv, layer)
            else:
                cache.update_conv_state(at.expand(batch, 4, count).contiguous(), layer)

    def prepare(at: int) -> None:
        cache.reset()
        cache.activate_past_recording()
        step(0, 20)
        cache.crop(0)
        step(20, 6)

    def act(at: int) -> None:
        if change == "crop":
            cache.crop(-4)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        elif change == "reset":
            cache.reset()
        else:
            step(26, 2)

    def check(at: int) -> None:
        with suppress(SpdkKvError):  # where it ended half-way
            tokens = cache.get_seq_length()
            batch = 2 if cache.sequence is None else cache.sequence.shape.batch
            step(tokens, 1, batch)
            for layer in (0, 2, 3):
                newest = cache.get_conv_state(layer)[:, 0, -2:].tolist()
                assert newest == [[tokens - 1, tokens]] * batch or tokens == 0
            assert cache.layers[1].keys[:, 0, -1, 0].tolist() == [tokens] * batch
            return
        cache.reset()
        step(0, 3)

    interrupted_everywhere(prepare, act, check, step=rounds(37, 5))
    cache.close()
