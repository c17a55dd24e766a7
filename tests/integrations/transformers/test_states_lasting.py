"""Caches with a name for models with states: those are stored beside the K/V, and go on or miss."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.families.decode import tiny_model
from integrations.transformers.models import generate, prompt
from spdk_kv.errors import StoreMismatch
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache, snapshot
from spdk_kv.integrations.transformers import lasting as lasting_module
from spdk_kv.store import SLOTS, KVStore, companion_key
from spdk_kv.store import open as open_store
from support.places import TESTS
from support.waiting import PATIENCE_S

# Convolution alone, recurrence, several states per layer, both kinds and K/V in one layer.
FAMILIES = ["lfm2_moe", "qwen3_next", "granitemoehybrid", "falcon_h1"]
MORE = ["qwen4_exp_text", "nemotron_h", "zamba2", "gemma3n_text", "qwen3_5_text", "olmo_hybrid"]
DTYPES = [torch.float32, torch.bfloat16]


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return tiny_model(family, seed).to(dtype)


@pytest.fixture
def where(tmp_path: Path) -> str:
    return f"file://{tmp_path}/kv"


def opened(where: str) -> KVStore:
    return open_store(where, capacity="64 MiB", flush_interval_s=None)


def ids(tokens: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    return prompt(batch, tokens, seed)["input_ids"]


def tell(model: Any, kv: Any, text: torch.Tensor, **options: Any) -> Any:
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return generate(model, kv, inputs, **options)


class Chat:
    """A text with its turns, and what DynamicCache makes of it."""

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.model, self.batch = model, batch
        self.kv = DynamicCache(config=model.config)
        self.text = ids(40, batch=batch)
        self.turns = 0

    def wanted(self) -> Any:
        """What the next turn brings; the text has it, and a question after it."""
        found = tell(self.model, self.kv, self.text)
        self.turns += 1
        question = ids(9, 20 + self.turns, self.batch)
        self.text = torch.cat([found.sequences, question], dim=1)
        return found


def same(found: Any, wanted: Any) -> None:
    assert found.sequences.tolist() == wanted.sequences.tolist()
    assert all(map(torch.equal, found.logits, wanted.logits))


def fresh(model: Any, text: torch.Tensor) -> Any:
    return tell(model, DynamicCache(config=model.config), text)


def named(store: KVStore, model: Any, text: torch.Tensor, name: str = "chat") -> OffloadedKVCache:
    return OffloadedKVCache(store, model, name=name, input_ids=text)


def run(where: str, model: Any, text: torch.Tensor, wanted: Any) -> int:
    """One turn in a store that is opened for it. Returns how many tokens were there."""
    with opened(where) as store, named(store, model, text) as kv:
        same(tell(model, kv, text), wanted)
        return kv.saved_tokens


# -- goes on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, DTYPES[n % 2]) for n, family in enumerate(FAMILIES + MORE)],
    ids=str,
)
def test_goes_on_where_it_was_closed(where: str, family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    chat, held = Chat(model), 0
    for _ in range(3):
        text = chat.text
        assert run(where, model, text, chat.wanted()) == held
        held = text.shape[1] + 11


def test_a_batch_goes_on(where: str) -> None:
    model = model_of("qwen3_next")
    chat = Chat(model, batch=3)
    for held in (0, 51, 72):
        assert run(where, model, chat.text, chat.wanted()) == held


def test_beams_go_on_as_the_rows_that_they_became(where: str) -> None:
    model, text = model_of("granitemoehybrid"), ids(30)
    with opened(where) as store:
        with named(store, model, text) as kv:
            tell(model, kv, text, num_beams=3)
            known = kv.history.text.ids.T.astype("int64")
        wider = torch.cat([torch.tensor(known), ids(5, 3, 3)], dim=1)
        with named(store, model, wider) as kv:
            assert kv.saved_tokens == known.shape[1]
            wanted = fresh(model, wider)
            assert tell(model, kv, wider).sequences.tolist() == wanted.sequences.tolist()


def test_cropped_convolution_goes_on_from_where_it_was_cropped(where: str) -> None:
    model, text = model_of("lfm2_moe"), ids(40)
    with opened(where) as store:
        with named(store, model, text) as kv:
            kv.activate_past_recording()
            forward(model, kv, text)
            kv.crop(-4)
        with named(store, model, text) as kv:
            assert kv.saved_tokens == 36
            assert kv.is_recording_past(0)
            found = forward(model, kv, text[:, 36:])
    theirs = DynamicCache(config=model.config)
    theirs.activate_past_recording()
    forward(model, theirs, text)
    theirs.crop(-4)
    assert torch.equal(found, forward(model, theirs, text[:, 36:]))


def forward(model: Any, kv: Any, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(text, **{CACHE_ARGUMENT: kv}).logits
    return logits


def test_a_fork_of_what_was_taken_up_goes_on_alone(where: str) -> None:
    model = model_of("qwen3_next")
    chat = Chat(model)
    run(where, model, chat.text, chat.wanted())
    text, wanted = chat.text, chat.wanted()
    with opened(where) as store, named(store, model, text) as kv, kv.fork() as twin:
        same(tell(model, twin, text), wanted)
        same(tell(model, kv, text), wanted)


# -- misses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_another_text_or_an_earlier_place_of_it_is_a_miss(where: str, family: str) -> None:
    model = model_of(family)
    chat = Chat(model)
    first = chat.text
    run(where, model, first, chat.wanted())
    parted = chat.text.clone()
    parted[0, 45] = (parted[0, 45] + 1) % 90 + 2
    for text in (parted, first, ids(60, 9)):
        assert run(where, model, text, fresh(model, text)) == 0


def test_states_of_a_text_that_was_replaced_are_a_miss(where: str) -> None:
    model, text = model_of("lfm2_moe"), ids(40)
    other = torch.cat([text[:, :36], ids(14, 9)], dim=1)
    with opened(where) as store:
        kv = named(store, model, text)
        kv.activate_past_recording()
        forward(model, kv, text)
        store.flush()
        assert len(states(store)) == 1
        kv.crop(-4)
        forward(model, kv, other[:, 36:40])
        del kv  # the states stored are those of as many tokens, and others
        gc.collect()
        with named(store, model, other) as kv:
            assert kv.saved_tokens == 0
            same(tell(model, kv, other), fresh(model, other))


def test_another_model_is_refused(where: str) -> None:
    model, other = model_of("qwen3_next"), model_of("qwen3_next", seed=1)
    chat = Chat(model)
    run(where, model, chat.text, chat.wanted())
    with opened(where) as store, pytest.raises(StoreMismatch, match="weights"):
        named(store, other, chat.text)


def test_without_text_it_begins_anew_and_puts_no_states(where: str) -> None:
    model, text = model_of("lfm2_moe"), ids(40)
    with opened(where) as store:
        with OffloadedKVCache(store, model.config, name="chat") as kv:
            same(tell(model, kv, text), fresh(model, text))
        assert states(store) == []
    assert run(where, model, text, fresh(model, text)) == 0


def states(store: KVStore) -> list[int]:
    """The slots that are taken."""
    return [slot for slot in range(SLOTS) if companion_key("chat", slot) in store]


def test_states_that_are_gone_or_damaged_are_a_miss(where: str) -> None:
    model = model_of("qwen3_next")
    chat = Chat(model)
    run(where, model, chat.text, chat.wanted())
    text, wanted = chat.text, fresh(model, chat.text)
    with opened(where) as store:
        (slot,) = states(store)
        whole = store.get(companion_key("chat", slot))
    cut = whole[: len(whole) // 2].clone()
    other = whole.clone()
    other[200] ^= 1  # in the head
    for left in (None, cut, other, torch.zeros(5), torch.zeros(0, dtype=torch.uint8)):
        with opened(where) as store:
            store.sequence("chat").delete()
            assert states(store) == [], "they go with the sequence"
        again = Chat(model)
        run(where, model, again.text, again.wanted())
        with opened(where) as store:
            key = companion_key("chat", *states(store))
            store.delete(key) if left is None else store.put(key, left)
        assert run(where, model, text, wanted) == 0


def test_evicted_sequence_takes_its_states_along(where: str) -> None:
    model = model_of("qwen3_next")
    chat = Chat(model)
    options = {"capacity": "4 MiB", "eviction": "lru", "flush_interval_s": None}
    with open_store(where, **options) as store:
        with named(store, model, chat.text) as kv:
            same(tell(model, kv, chat.text), chat.wanted())
        store.flush()
        del kv
        gc.collect()
        (slot,) = states(store)
        for number in range(2000):
            if "chat" not in store.sequences():
                break
            store.get(companion_key("chat", slot))  # used later than the sequence
            store.put(str(number), torch.zeros(8192, dtype=torch.uint8))
        assert "chat" not in store.sequences()
        assert states(store) == []
        text = chat.text
        with named(store, model, text) as kv:
            assert kv.saved_tokens == 0


# -- what a flush stores ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_flush_stores_the_states_of_a_live_cache(where: str, family: str) -> None:
    model = model_of(family)
    chat = Chat(model)
    with opened(where) as store:
        kv = named(store, model, chat.text)
        same(tell(model, kv, chat.text), chat.wanted())
        store.flush()
        before = store.stats()["engine"]
        store.flush()
        assert store.stats()["engine"] == before, "the same states are not put again"
        del kv  # without close()
        gc.collect()
    assert run(where, model, chat.text, chat.wanted()) == 51


@pytest.mark.parametrize("family", FAMILIES)
def test_flush_amid_a_pass_keeps_the_states_of_before(where: str, family: str) -> None:
    model = model_of(family)
    chat = Chat(model)
    first, wanted = chat.text, chat.wanted()
    second = chat.wanted(), chat.text
    layers = next(part.layers for part in model.modules() if hasattr(part, "layers"))
    with opened(where) as store:
        kv = named(store, model, first)
        same(tell(model, kv, first), wanted)
        store.flush()
        hooks = [
            hook
            for layer in layers
            for hook in (
                layer.register_forward_pre_hook(lambda *_: flush_in_thread(store)),
                layer.register_forward_hook(lambda *_: flush_in_thread(store)),
            )
        ]
        try:
            text = torch.cat([wanted.sequences, ids(9, 21)], dim=1)
            same(tell(model, kv, text), second[0])
        finally:
            for hook in hooks:
                hook.remove()
        del kv
        gc.collect()
    with opened(where) as store, named(store, model, second[1]) as kv:
        assert kv.saved_tokens == 51
        assert tell(model, kv, second[1]).sequences.tolist() == chat.wanted().sequences.tolist()


def flush_in_thread(store: KVStore) -> None:
    thread = threading.Thread(target=store.flush)
    thread.start()
    thread.join()


def test_states_that_change_while_they_are_copied_are_not_put(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = model_of("granitemoehybrid"), ids(40)
    with opened(where) as store:
        kv = named(store, model, text)
        forward(model, kv, text)

        def copied_amid(whose: str, layers: Any) -> torch.Tensor:
            monkeypatch.undo()
            forward(model, kv, text[:, :1])
            return snapshot.encode(whose, layers)

        monkeypatch.setattr(lasting_module.snapshot, "encode", copied_amid)
        store.flush()
        assert states(store) == []
        store.flush()
        assert len(states(store)) == 1


def test_after_a_pass_that_failed_nothing_is_put_until_it_begins_anew(where: str) -> None:
    model, text = model_of("falcon_h1"), ids(40)
    last = next(part.layers for part in model.modules() if hasattr(part, "layers"))[-1]
    with opened(where) as store:
        kv = named(store, model, text)
        forward(model, kv, text)
        hook = last.register_forward_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            forward(model, kv, text[:, :1])
        hook.remove()
        store.flush()
        forward(model, kv, text[:, :1])
        store.flush()
        assert states(store) == []
        kv.reset()
        forward(model, kv, text)
        store.flush()
        assert len(states(store)) == 1
        kv.close()


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_flushes_by_another_thread_at_any_moment(where: str) -> None:
    model = model_of("qwen3_next")
    chat = Chat(model)
    stop = threading.Event()
    for _ in range(4):
        text, wanted = chat.text, chat.wanted()
        with opened(where) as store:
            stop.clear()
            thread = threading.Thread(target=_flush_until, args=(store, stop))
            thread.start()
            kv = named(store, model, text)
            found = tell(model, kv, text)
            stop.set()
            thread.join()
            assert found.sequences.tolist() == wanted.sequences.tolist()
            del kv
            gc.collect()


def _flush_until(store: KVStore, stop: threading.Event) -> None:
    while not stop.is_set():
        store.flush()


# -- killed ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)  # as here: with others the last bits are others
from integrations.transformers import test_states_lasting as tests
model = tests.model_of({family!r})
chat = tests.Chat(model)
store = tests.opened({where!r})
kv = tests.named(store, model, chat.text)
tests.tell(model, kv, chat.text)
chat.wanted()
if {flushed}:
    store.flush()
if {amid}:
    layers = next(part.layers for part in model.modules() if hasattr(part, "layers"))
    for layer in layers:
        layer.register_forward_hook(lambda *_: store.flush())
    tests.tell(model, kv, chat.text, max_new_tokens=4)
    layers[-1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    tests.tell(model, kv, torch.cat([chat.text, tests.ids(9, 9)], dim=1))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("flushed", "amid"), [(False, False), (True, False), (True, True)])
def test_killed_process_leaves_what_was_flushed(
    where: str, family: str, flushed: bool, amid: bool
) -> None:
    fields = {"family": family, "where": where, "flushed": flushed, "amid": amid}
    script = KILLED.format(**fields, tests=str(TESTS))
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    model = model_of(family)
    chat = Chat(model)
    chat.wanted()
    text = chat.text
    wanted = chat.wanted() if flushed else fresh(model, text)
    assert run(where, model, text, wanted) == (51 if flushed else 0)
