"""What a tier is made of, without vLLM: options, keys, and how much may wait."""

from __future__ import annotations

import os
import re
from concurrent.futures import Future

import numpy as np
import pytest

from spdk_kv.errors import ClosedError
from spdk_kv.integrations.vllm.asking import Asking
from spdk_kv.integrations.vllm.identity import Keys, weights_of
from spdk_kv.integrations.vllm.options import TierOptions
from spdk_kv.integrations.vllm.pages import Pages
from spdk_kv.integrations.vllm.waiting import Waiting

PLACE = {"location": "file:///nowhere"}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({**PLACE, "capcity": "1 GiB"}, "no option 'capcity' (did you mean 'capacity'?)"),
        ({**PLACE, "root_dir": "/x"}, "no option 'root_dir'; there are location, capacity"),
        ({}, '"location" is needed'),
        ({**PLACE, "workers": 1}, "at least 2"),
        ({**PLACE, "most_waiting": "lots"}, "lots"),
        ({**PLACE, "most_waiting": 0}, "at least 1 byte"),
        ({**PLACE, "patience_s": 0}, "more than 0 seconds"),
    ],
)
def test_options_that_make_no_sense_are_named(given, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        TierOptions.of(given)


def test_a_replica_has_a_place_of_its_own(tmp_path):
    options = TierOptions.of({"location": f"file://{tmp_path}/kv-{{dp}}", "capacity": "4 MiB"})
    with options.open(3) as store:
        assert store.location == f"file://{tmp_path}/kv-3"


def test_an_engine_may_have_options_of_its_own(tmp_path):
    engine = {"name": "threads", "depth": 2}
    given = {"location": f"file://{tmp_path}/kv", "capacity": "4 MiB", "engine": engine}
    with TierOptions.of(given).open(0) as store:
        assert store.engine.name == "threads"


def test_keys_are_short_and_those_of_other_facts_are_others():
    keys = Keys({"model": "a"})
    names = [keys(bytes([number]) * length) for number in range(9) for length in (0, 36, 1024)]
    assert len(set(names)) == 9 * 2 + 1
    assert {len(name) for name in names} == {22}
    assert keys(b"k") == Keys({"model": "a"})(b"k")
    assert keys(b"k") != Keys({"model": "b"})(b"k")


def test_a_model_in_a_folder_is_told_by_its_files(tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"1234")
    before = weights_of(str(tmp_path), "")
    assert weights_of(str(tmp_path), "") == before
    named = weights_of(str(tmp_path), "rev-1")
    os.utime(weights, ns=(1, 1))
    assert weights_of(str(tmp_path), "") != before
    assert weights_of(str(tmp_path), "rev-1") == named != weights_of(str(tmp_path), "rev-2")


def test_what_is_left_of_a_download_ends_no_start(tmp_path):
    (tmp_path / "weights").write_bytes(b"1234")
    before = weights_of(str(tmp_path), "")
    (tmp_path / "more").symlink_to(tmp_path / "blobs" / "gone")
    assert weights_of(str(tmp_path), "") == before


def test_a_model_that_is_known_by_its_name_only_is_said_to_be(caplog):
    assert weights_of("org/model", "") == ["name"]
    assert "identity" in caplog.text
    caplog.clear()
    weights_of("org/model", "main")
    assert not caplog.text


def test_stores_beyond_the_limit_do_not_wait():
    waiting = Waiting(most_stores_nbytes=100, patience_s=1)
    assert waiting.may_store(1000), "however large, where nothing else waits"
    waiting.began_store(1, 60)
    assert waiting.may_store(40)
    assert not waiting.may_store(41)
    waiting.ended(1)
    assert waiting.may_store(1000)


def test_lookups_miss_while_the_oldest_load_waits_too_long():
    waiting = Waiting(most_stores_nbytes=100, patience_s=1)
    waiting.began_load(1, 10.0)
    waiting.began_load(2, 10.5)
    waiting.look(11.0)
    assert not waiting.lookups_miss
    waiting.look(11.1)
    assert waiting.lookups_miss
    waiting.ended(1)
    waiting.look(11.2)
    assert not waiting.lookups_miss
    waiting.ended(2)
    waiting.look(99.0)
    assert not waiting.lookups_miss


def test_pages_are_made_when_they_are_looked_at():
    made = []
    rows = np.arange(12, dtype=np.int8).reshape(3, 4)
    pages = Pages(lambda key: made.append(key) or key.hex(), [b"a", b"b"], rows, [2, 0])
    assert len(pages) == 2
    assert not made
    assert [(name, row.tolist()) for name, row in pages] == [
        ("61", [8, 9, 10, 11]),
        ("62", [0, 1, 2, 3]),
    ]
    assert pages[1][0] == "62"
    assert len(made) == 2, "once"


def test_answers_come_later_and_are_forgotten_with_the_request():
    asked: list[tuple[list[str], Future[list[bool]]]] = []

    def ask(names):
        asked.append((list(names), Future()))
        return asked[-1][1]

    asking = Asking(ask, patience_s=10.0)
    assert asking.find("a", "r1") is None
    assert asking.find("b", "r1") is None
    assert asking.find("a", "r2") is None
    asking.begin(0.0)
    asking.begin(0.0)
    asking.take(1.0)
    assert asking.find("a", "r1") is None
    ((names, answer),) = asked
    assert names == ["a", "b"]
    answer.set_result([True, False])
    asking.take(1.0)
    assert (asking.find("a", "r1"), asking.find("b", "r1")) == (True, False)
    asking.missed("a")
    assert asking.find("a", "r1") is False
    asking.forget("r1")
    assert asking.find("a", "r3") is None
    asking.begin(0.0)
    asked[-1][1].set_exception(OSError())
    asking.take(1.0)
    assert asking.find("a", "r3") is False


def test_a_disk_that_does_not_answer_is_misses_and_not_asked_on():
    asked: list[Future[list[bool]]] = []

    def ask(names):
        asked.append(Future())
        return asked[-1]

    asking = Asking(ask, patience_s=10.0)
    assert asking.find("a", "r1") is None
    asking.begin(0.0)
    asking.take(10.0)
    assert asking.find("a", "r1") is None
    asking.take(10.1)
    assert asking.find("a", "r1") is False
    assert asking.find("b", "r2") is False
    asking.begin(10.2)
    assert len(asked) == 1
    # What it says in the end is no answer to who has computed it meanwhile; then it is asked anew.
    asked[0].set_result([True])
    asking.take(20.0)
    assert asking.find("a", "r1") is False
    assert asking.find("c", "r2") is None
    asking.begin(20.0)
    asked[1].set_result([True])
    asking.take(20.1)
    assert asking.find("c", "r2") is True


def test_what_cannot_even_be_asked_is_missing():
    def ask(names):
        raise ClosedError("the store is being closed")

    asking = Asking(ask, patience_s=10.0)
    assert asking.find("a", "r1") is None
    asking.begin(0.0)
    assert asking.find("a", "r1") is False
