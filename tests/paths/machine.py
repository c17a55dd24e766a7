"""What state machines over sequences with two paths have in common, however the paths are made."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import spdk_kv
from paths.helpers import MIB, PLENTY, set_available
from sequence.helpers import Reference
from spdk_kv.units import KIB

# 64 rows of 256 bytes to a chunk, so chunks fill often; a unit is 384 KiB when full.
LITTLE = spdk_kv.KVShape(3, 2, 16, "float32", 1500, 2)


class TwoSequences(RuleBasedStateMachine):
    """Two sequences of the shape ``LITTLE``, and what each should hold; made by who inherits."""

    store: spdk_kv.KVStore
    sequences: list[Any]
    references: list[Reference]

    which = st.integers(0, 1)
    layer = st.integers(0, LITTLE.layers - 1)

    @rule(which=which, layer=layer, count=st.sampled_from([1, 7, 64, 65, 300]))
    def append(self, which: int, layer: int, count: int) -> None:
        sequence = self.sequences[which]
        count = min(count, LITTLE.max_tokens - sequence.tokens(layer))
        self.references[which].append(sequence, count, layer)

    @rule(which=which, layer=layer)
    def read(self, which: int, layer: int) -> None:
        self.references[which].check_layer(self.sequences[which], layer)

    @rule(which=which, layer=layer, first=st.integers(0, 1500), heads=st.sampled_from([None, [1]]))
    def read_part(self, which: int, layer: int, first: int, heads: list[int] | None) -> None:
        asked: dict[str, Any] = {"tokens": slice(first, first + 100), "heads": heads}
        self.references[which].check_layer(self.sequences[which], layer, **asked)

    @rule(which=which, layers=st.permutations(range(LITTLE.layers)), spare=st.integers(0, 70))
    def prefetch(self, which: int, layers: list[int], spare: int) -> None:
        self.sequences[which].prefetch(layers, spare_tokens=spare)

    @rule(which=which, layer=layer, data=st.data())
    def truncate(self, which: int, layer: int, data: st.DataObject) -> None:
        keep = data.draw(st.integers(0, self.sequences[which].tokens(layer)))
        self.references[which].truncate(self.sequences[which], keep, layer)

    @rule(nbytes=st.sampled_from([0, 100 * KIB, 600 * KIB, 2 * MIB, PLENTY]))
    def decide(self, nbytes: int) -> None:
        set_available(self.store, nbytes)
        self.store.paths.decide()

    @rule()
    def flush(self) -> None:
        self.store.flush()
