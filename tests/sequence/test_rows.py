"""Any order of calls on a sequence whose rows divide no chunk, against plain tensors."""

from __future__ import annotations

import shutil
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sequence.helpers import Reference, shape_of
from store.helpers import check_books, open_store, reopen
from support.rounds import examples

MOST = 250
counts = st.sampled_from([0, 1, 2, 67, 68, 69, 140])
layers = st.sampled_from([None, 0, 1])


class RowsMachine(RuleBasedStateMachine):
    """One sequence of two layers; rows of 240 bytes, chunks of 16 KiB: 68.3 tokens a chunk."""

    @initialize(
        engine=st.sampled_from(["uring", "threads", "pagecache"]),
        granularity=st.sampled_from(["layer", "head", "token"]),
    )
    def begin(self, engine, granularity):
        self.folder = tempfile.mkdtemp(prefix="spdk_kv-test-")
        self.engine = engine
        self.store = open_store(self.folder, capacity="8 MiB", engine=engine)
        shape = shape_of(max_tokens=MOST)
        self.sequence = self.store.sequence("s", shape, granularity=granularity)
        self.reference = Reference(shape)

    def teardown(self):
        if hasattr(self, "store"):
            self.reference.check(self.sequence)
            check_books(self.store)
            self.store.close()
            shutil.rmtree(self.folder)

    def longest(self, layer):
        chosen = self.reference.layers if layer is None else [self.reference.layers[layer]]
        return max(k.shape[2] for k, _ in chosen)

    def shortest(self, layer):
        chosen = self.reference.layers if layer is None else [self.reference.layers[layer]]
        return min(k.shape[2] for k, _ in chosen)

    @rule(count=counts, layer=layers)
    def append(self, count, layer):
        self.reference.append(self.sequence, min(count, MOST - self.longest(layer)), layer)

    @rule(layer=layers, share=st.floats(0, 1))
    def truncate(self, layer, share):
        self.reference.truncate(self.sequence, int(share * self.shortest(layer)), layer)

    @rule(rows=st.sampled_from([[1, 0], [0, 0], [1, 1], [0, 1]]))
    def reorder(self, rows):
        self.reference.reorder(self.sequence, rows)

    @rule(first=st.sampled_from([0, 0, 50]), spare=st.sampled_from([0, 1, 200]))
    def prefetch(self, first, spare):
        self.sequence.prefetch([0, 1], first_token=first, spare_tokens=spare)

    @rule(layer=st.sampled_from([0, 1]))
    def read(self, layer):
        self.reference.check_layer(self.sequence, layer)

    @rule(
        layer=st.sampled_from([0, 1]),
        start=st.integers(0, MOST),
        count=st.integers(0, MOST),
        heads=st.sampled_from([None, [0], [2, 1], [0, 1, 2]]),
    )
    def read_some(self, layer, start, count, heads):
        tokens = slice(start, start + count)
        self.reference.check_layer(self.sequence, layer, tokens=tokens, heads=heads)

    @rule()
    def flush(self):
        self.store.flush()

    @rule()
    def reopen(self):
        self.store.close()
        self.store = reopen(self.folder, engine=self.engine)
        self.sequence = self.store.sequence("s")


TestRows = RowsMachine.TestCase
TestRows.settings = settings(max_examples=examples(25), stateful_step_count=30)
