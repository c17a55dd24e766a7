"""Any order of calls on a store, against a dict."""

from __future__ import annotations

import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from spdk_kv.errors import CapacityError, KeyNotFound
from store.helpers import check_books, open_store, payload, reopen, version_of
from support.rounds import examples

KEYS = [f"key {i}" for i in range(6)]
SIZES = [16, 17, 4096, 5000, 65_536, 200_000]


class StoreMachine(RuleBasedStateMachine):
    """One megabyte: puts evict, replace and are refused; extents are reused all the time."""

    eviction = "lru"
    tensors = Bundle("tensors")

    @initialize(engine=st.sampled_from(["uring", "threads", "pagecache"]))
    def begin(self, engine):
        self.folder = tempfile.mkdtemp(prefix="spdk_kv-test-")
        self.engine = engine
        self.version = 0
        self.model: dict[str, int] = {}
        self.held: list[tuple[str, int, np.ndarray]] = []
        self.store = open_store(
            self.folder, capacity="1 MiB", engine=engine, eviction=self.eviction
        )

    def teardown(self):
        if hasattr(self, "store"):
            check_books(self.store)
            self.store.close()
            shutil.rmtree(self.folder)

    def forget_evicted(self):
        if self.eviction == "lru":
            there = set(self.store.keys())
            self.model = {key: version for key, version in self.model.items() if key in there}

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=3), data=st.data())
    def put(self, keys, data):
        self.version += 1
        tensors = {
            key: payload(key, self.version, data.draw(st.sampled_from(SIZES))) for key in keys
        }
        try:
            self.store.put_many(tensors)
        except CapacityError:
            assert sum(map(len, tensors.values())) > 100_000
        else:
            self.model |= dict.fromkeys(keys, self.version)
        self.forget_evicted()

    @rule(key=st.sampled_from(KEYS))
    def get(self, key):
        if key in self.model:
            found = self.store.get(key, as_numpy=True)
            assert version_of(key, found) == self.model[key]
            # Held, so that it is seen when what was got does not stay as it was.
            self.held = [*self.held[-5:], (key, self.model[key], found)]
        else:
            with pytest.raises(KeyNotFound):
                self.store.get(key)

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key):
        assert self.store.delete(key) == (self.model.pop(key, None) is not None)

    @rule()
    def flush(self):
        self.store.flush()

    @rule()
    def reopen(self):
        order = self.store.keys()
        self.store.close()
        self.store = reopen(self.folder, engine=self.engine, eviction=self.eviction)
        assert self.store.keys() == order

    @invariant()
    def holds_what_the_model_holds(self):
        if hasattr(self, "store"):
            assert set(self.store.keys()) == set(self.model)
            assert len(self.store) == len(self.model)
            self.store.catalog.records.extents.allocator.check()

    @invariant()
    def what_was_got_stays(self):
        for key, version, found in getattr(self, "held", ()):
            assert version_of(key, found) == version


class FullMachine(StoreMachine):
    """Without eviction: nothing ever goes by itself."""

    eviction = "none"


few = settings(max_examples=examples(25), stateful_step_count=30)
TestEvicting = StoreMachine.TestCase
TestEvicting.settings = few
TestFull = FullMachine.TestCase
TestFull.settings = few
