"""A sequence against the plainest model there is: a list of tensors in memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spdk_kv import KVShape
from store.helpers import open_store, reopen
from support.rounds import examples

LAYERS = 2


class SequenceMachine(RuleBasedStateMachine):
    """Appends, reads, prefetches, truncates, reorders, flushes and reopens."""

    options: dict[str, Any]
    granularity: str
    shape: KVShape

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="spdk_kv-test-"))
        self.store = open_store(self.folder, capacity="64 MiB", **self.options)
        self.sequence = self.store.sequence("s", self.shape, granularity=self.granularity)
        shape = self.shape
        empty = torch.empty(shape.batch, shape.kv_heads, 0, shape.head_dim)
        self.model = [(empty, empty) for _ in range(LAYERS)]
        self.seed = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    def tokens(self, layer: int) -> int:
        return self.model[layer][0].shape[2]

    @rule(layer=st.integers(0, LAYERS - 1), count=st.sampled_from([1, 2, 7, 63, 64, 65, 300]))
    def append(self, layer: int, count: int) -> None:
        shape = self.shape
        count = min(count, shape.max_tokens - self.tokens(layer))
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        k, v = torch.randn(
            2, shape.batch, shape.kv_heads, count, shape.head_dim, generator=generator
        )
        self.sequence.append(layer, k, v)
        old_k, old_v = self.model[layer]
        self.model[layer] = (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2))

    @rule(layer=st.integers(0, LAYERS - 1))
    def read(self, layer: int) -> None:
        k, v = self.sequence.read(layer)
        assert torch.equal(k, self.model[layer][0])
        assert torch.equal(v, self.model[layer][1])

    @rule(layer=st.integers(0, LAYERS - 1), data=st.data())
    def read_part(self, layer: int, data: st.DataObject) -> None:
        tokens = self.tokens(layer)
        first = data.draw(st.integers(0, tokens))
        last = data.draw(st.integers(first, tokens))
        heads = data.draw(st.lists(st.integers(0, self.shape.kv_heads - 1), max_size=3))
        k, v = self.sequence.read(layer, tokens=slice(first, last), heads=heads)
        assert torch.equal(k, self.model[layer][0][:, heads, first:last])
        assert torch.equal(v, self.model[layer][1][:, heads, first:last])

    @rule(layer=st.integers(0, LAYERS - 1), spare=st.integers(0, 70))
    def prefetch(self, layer: int, spare: int) -> None:
        self.sequence.prefetch([layer], spare_tokens=spare)

    @rule(layer=st.integers(0, LAYERS - 1), data=st.data())
    def truncate(self, layer: int, data: st.DataObject) -> None:
        keep = data.draw(st.integers(0, self.tokens(layer)))
        self.sequence.truncate(keep, layer=layer)
        k, v = self.model[layer]
        self.model[layer] = (k[:, :, :keep], v[:, :, :keep])

    @rule(rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def reorder(self, rows: list[int]) -> None:
        self.sequence.reorder(rows)
        self.model = [(k[rows], v[rows]) for k, v in self.model]

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @precondition(lambda self: hasattr(self, "store"))
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = reopen(self.folder, **self.options)
        self.sequence = self.store.sequence("s")
        assert self.sequence.shape == self.shape
        assert self.sequence.granularity == self.granularity

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "sequence"):
            assert [self.sequence.tokens(n) for n in range(LAYERS)] == [
                self.tokens(n) for n in range(LAYERS)
            ]


@pytest.mark.parametrize("granularity", ["layer", "head", "token"])
@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
def test_a_sequence_is_always_what_was_appended(engine: str, granularity: str) -> None:
    if engine == "uring":
        from spdk_kv.engines.uring import why_unavailable

        if missing := why_unavailable():
            pytest.skip(missing[0])
    name = f"Machine_{engine}_{granularity}"
    machine = type(
        name,
        (SequenceMachine,),
        {
            "options": {"engine": engine},
            "granularity": granularity,
            # 64 rows of 256 bytes (128 per head) to a chunk of 16 KiB: chunks fill often.
            "shape": KVShape(LAYERS, 2, 16, "float32", 1500, 2),
        },
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(15),
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )
