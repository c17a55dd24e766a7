"""One question, answered with the KV cache kept in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from spdk_kv.demo.asking.ways import Way
from spdk_kv.demo.generation import Generation, generate
from spdk_kv.errors import ShapeMismatch
from spdk_kv.terminal import progress

if TYPE_CHECKING:
    import torch

    from spdk_kv.integrations.transformers import OffloadedKVCache
    from spdk_kv.store import KVStore

# Tokens of the prompt that are computed at once: enough for the matrices, and often enough for a
# progress bar.
_CHUNK_TOKENS = 256
_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """What one way gave, and what it took.

    Attributes:
        resident_nbytes: K and V in memory at most at once.
        read_nbytes: What the store read meanwhile.
    """

    way: Way
    generation: Generation
    resident_nbytes: int
    read_nbytes: int

    @property
    def read_nbytes_per_token(self) -> float:
        """Every token, the first included, took one forward pass."""
        return self.read_nbytes / len(self.generation.tokens)


class Asked(NamedTuple):
    """What came of asking.

    Attributes:
        prompt_s: Seconds that computing the prompt once took; None if each way did.
        answers: In the order of the ways.
        left_out: Ways that do not serve the model, each with the reason.
    """

    prompt_s: float | None
    answers: list[Answer]
    left_out: list[str]


def ask(
    store: KVStore, model: Any, prompt: torch.Tensor, new_tokens: int, ways: Sequence[Way]
) -> Asked:
    """Answers ``prompt`` in each of ``ways``. Blocks.

    All tokens of the prompt but the last are computed once, onto the drive, and each way is given
    a copy of their K and V. So what an answer takes is decoding alone, and no K and V is in memory
    but the way's own. Where some layers do not keep K and V of all tokens, as with sliding windows
    and states, each way computes the prompt.

    Args:
        prompt: Token ids, ``[1, tokens]``.
        new_tokens: The most tokens of an answer.

    Raises:
        ShapeMismatch: An exact way cannot serve the model.
    """
    from transformers import DynamicCache

    from spdk_kv.integrations.transformers import OffloadedKVCache

    serving, left_out = _serving(store, model, ways)
    # The first pass also sets up torch's threads and kernels.
    short = prompt[:, :_WARM_UP_TOKENS]
    generate(model, short, 2, DynamicCache(config=model.config), _nothing)
    if not _keeps_all(model):
        answers = [_answer(store, model, prompt, new_tokens, way, None) for way in serving]
        return Asked(None, answers, left_out)
    with OffloadedKVCache(store, model) as computed:
        prompt_s = _compute(model, prompt[:, :-1], computed)
        answers = [_answer(store, model, prompt, new_tokens, way, computed) for way in serving]
    return Asked(prompt_s, answers, left_out)


def _serving(store: KVStore, model: Any, ways: Sequence[Way]) -> tuple[list[Way], list[str]]:
    """The ways that serve the model, and what the others say."""
    serving, left_out = [], []
    for way in ways:
        try:
            with way.open(store, model):
                serving.append(way)
        except ShapeMismatch as refused:
            if way.exact:
                raise
            left_out.append(f"{way.name}: {refused}")
    return serving, left_out


def _keeps_all(model: Any) -> bool:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def _compute(model: Any, prompt: torch.Tensor, cache: Any) -> float:
    with progress(prompt.shape[1], "reading the document") as advance:
        hook = model.register_forward_hook(lambda *_: advance(_CHUNK_TOKENS))
        try:
            return generate(model, prompt, 1, cache, _nothing, _CHUNK_TOKENS).prompt_s
        finally:
            hook.remove()


def _answer(
    store: KVStore,
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int,
    way: Way,
    computed: OffloadedKVCache | None,
) -> Answer:
    with way.open(store, model) as cache, progress(new_tokens, way.name) as advance:
        if computed is not None:
            _copy(computed, cache)
            store.flush()  # or decoding would wait for these writes
        before = _read_nbytes(store)
        generation = generate(model, prompt, new_tokens, cache, advance)
        read_nbytes = _read_nbytes(store) - before
        return Answer(way, generation, way.resident_nbytes(cache), read_nbytes)


def _copy(computed: OffloadedKVCache, cache: Any) -> None:
    sequence = computed.sequence
    assert sequence is not None
    for layer in range(sequence.shape.layers):
        cache.update(*sequence.read(layer), layer)


def _read_nbytes(store: KVStore) -> int:
    """Bytes read so far, by either path."""
    stats = store.stats()
    return int(stats["transfers"]["read_nbytes"] + stats["residency"]["cached_read_nbytes"])


def _nothing(count: int) -> None:
    pass
