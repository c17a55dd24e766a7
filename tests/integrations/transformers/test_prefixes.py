"""The index of stored texts finds the longest common beginning, whatever was added and removed."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest

from spdk_kv.integrations.transformers.prefixes import Prefixes
from spdk_kv.integrations.transformers.text import Ids, common_tokens


def as_ids(tokens: list[int]) -> Ids:
    return np.array(tokens, "<u4").reshape(-1, 1)


class Shelf:
    """An index beside the texts themselves."""

    def __init__(self) -> None:
        self.index = Prefixes()
        self.texts: dict[str, Ids] = {}

    def add(self, name: str, ids: Ids) -> None:
        nearest = self.index.candidate(ids)
        self.index.add(name, ids, None if nearest is None else self.texts[nearest])
        self.texts[name] = ids

    def remove(self, name: str) -> None:
        self.index.remove(name)
        del self.texts[name]

    def longest(self, ids: Ids) -> int:
        name = self.index.candidate(ids)
        return 0 if name is None else common_tokens(self.texts[name], ids)

    def judge(self, ids: Ids) -> int:
        return max((common_tokens(text, ids) for text in self.texts.values()), default=0)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_as_long_as_a_look_at_all_texts_finds(seed: int) -> None:
    rng, shelf = random.Random(seed), Shelf()
    vocabulary = rng.choice([2, 3, 50])

    def some() -> list[int]:
        base = list(rng.choice([ids[:, 0].tolist() for ids in shelf.texts.values()] or [[]]))
        del base[rng.randrange(len(base) + 1) :]
        return base + [rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 2, 9, 30]))]

    for number in range(400):
        if shelf.texts and rng.random() < rng.choice([0.1, 0.6]):
            shelf.remove(rng.choice(list(shelf.texts)))
        else:
            shelf.add(f"text {number}", as_ids(some()))
        assert len(shelf.index) == len(shelf.texts)
        for _ in range(3):
            asked = as_ids(some())
            assert shelf.longest(asked) == shelf.judge(asked)
    for name in list(shelf.texts):
        shelf.remove(name)
    assert len(shelf.index) == 0
    assert shelf.index.candidate(as_ids([1])) is None


def test_every_version_is_another() -> None:
    shelf, seen = Shelf(), set()
    for number in range(20):
        shelf.add(str(number), as_ids([number // 2, 3]))
        seen.add(shelf.index.version)
    for number in range(20):
        assert str(number) in shelf.index
        shelf.remove(str(number))
        seen.add(shelf.index.version)
    assert len(seen) == 40


def test_a_text_that_became_another_one_is_noticed() -> None:
    shelf = Shelf()
    shelf.add("chat", as_ids([1, 2, 3, 4]))
    assert shelf.index.is_still("chat", as_ids([1, 2, 3, 4]))
    assert shelf.index.is_still("chat", as_ids([1, 2, 3, 4, 9]))
    assert not shelf.index.is_still("chat", as_ids([1, 2, 3]))
    assert not shelf.index.is_still("chat", as_ids([1, 2, 3, 5]))
    assert not shelf.index.is_still("other", as_ids([1]))


def test_hits_and_times_are_counted_for_each_text() -> None:
    shelf = Shelf()
    shelf.add("a", as_ids([1, 2, 3]))
    shelf.add("b", as_ids([1, 2]))
    for now_s in (10.0, 20.0):
        shelf.index.hit("b", now_s)
    shelf.index.hit("nobody", 30.0)
    found = {text.name: (text.tokens, text.hits, text.used_s) for text in shelf.index.texts()}
    assert found == {"a": (3, 0, 0.0), "b": (2, 2, 20.0)}


@pytest.mark.parametrize("shared", [0, 700])
def test_ten_thousand_texts_take_less_than_a_kibibyte_each(shared: int) -> None:
    count, tokens = 10_000, 1024
    texts = np.random.default_rng(1).integers(0, 150_000, (count, tokens, 1)).astype("<u4")
    texts[:, :shared] = texts[0, :shared]
    names = {f"prompt-cache/0123456789abcdef/{number:032x}": number for number in range(count)}
    tracemalloc.start()
    index = Prefixes()
    for name, number in names.items():
        nearest = index.candidate(texts[number])
        index.add(str(name), texts[number], None if nearest is None else texts[names[nearest]])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / count < 1024
    for number in (0, 17, 9_999):
        found = index.candidate(texts[number][:900])
        assert found is not None
        assert names[found] == number
