"""What is measured for reading a part: real reads, real scoring, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spdk_kv.measure.sparse import (
    Subject,
    filled_sequence,
    measure_machine,
    read_groups,
    read_whole,
    time_selection,
    weights_nbytes_per_s,
)
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from spdk_kv.types import LayerShape

MIB = 1 << 20
LAYER = LayerShape(2, 64, "float16")  # 512 bytes per token
A_MOMENT_S = 1e-6  # the least number of reads


@pytest.fixture(params=["ram", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVStore]:
    location = "ram://" if request.param == "ram" else tmp_path / "store"
    with open_store(location, capacity="32 MiB") as opened:
        yield opened


def test_groups_are_read_from_a_sequence_that_is_gone_afterwards(store: KVStore) -> None:
    written = 0

    def advance(tokens: int) -> None:
        nonlocal written
        written += tokens

    with filled_sequence(store, LAYER, 3000, 2, advance) as sequence:
        assert [sequence.tokens(layer) for layer in (0, 1)] == [3000, 3000]
        found = read_groups(sequence, 8, 20, A_MOMENT_S)
        assert (found.groups, found.reads) == (20, 3)
        assert found.nbytes >= 20 * 8 * 512
        assert found.seconds > 0
        whole = read_whole(sequence, 4, A_MOMENT_S)
        assert whole.groups == 750
        assert whole.nbytes >= 3000 * 512
    assert written == 6000
    assert store.sequences() == []


def test_more_groups_than_there_are_become_all_of_them(store: KVStore) -> None:
    with filled_sequence(store, LAYER, 128, 1) as sequence:
        assert read_groups(sequence, 32, 500, A_MOMENT_S).groups == 3


def test_a_failure_leaves_no_sequence_behind(store: KVStore) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        filled_sequence(store, LAYER, 128, 1),
    ):
        raise RuntimeError("stop")
    assert store.sequences() == []


def test_scoring_takes_time_and_memory() -> None:
    found = time_selection(LAYER, 4, 3000, A_MOMENT_S)
    assert found.seconds > 0
    # 2 bits an element and one scale per token and KV head.
    assert found.token_nbytes == 2 * (64 / 4 + 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_a_speed(dtype: str) -> None:
    assert weights_nbytes_per_s(dtype, 2, A_MOMENT_S) > 0


def test_a_machine_is_measured_as_a_whole(store: KVStore) -> None:
    subject = Subject(
        layer=LAYER, layers=3, heads=4, tokens=1024, batch=2, weights_nbytes=10 * MIB,
        compute_s=None, seconds=A_MOMENT_S,
    )  # fmt: skip
    said: list[str] = []
    found = measure_machine(store, subject, MIB, said.append)
    machine, decoding = found.machine, found.decoding
    assert set(machine.reads) == {4, 8, 16, 32, 64}
    assert machine.score_s > 0
    # Not more than half of the groups of a layer, so that they are scattered.
    assert machine.reads[4].groups == (1, 8, 32, 128)
    assert machine.reads[64].groups == (1, 8)
    for size, times in machine.reads.items():
        for groups, nbytes in zip(times.groups, times.nbytes, strict=True):
            assert nbytes >= groups * size * 512
    assert (decoding.layers, decoding.token_nbytes, decoding.tokens) == (3, 512, 1024)
    assert decoding.batch == 2
    assert machine.compute_s > 0
    assert machine.whole_token_s > 0
    assert found.whole_nbytes_per_s > 0
    assert "scoring" in said
    assert store.sequences() == []


def test_a_known_step_is_not_measured(store: KVStore) -> None:
    subject = Subject(
        layer=LAYER, layers=2, heads=4, tokens=256, batch=1, weights_nbytes=0, compute_s=0.25,
        seconds=A_MOMENT_S,
    )  # fmt: skip
    assert measure_machine(store, subject, MIB, lambda text: None).machine.compute_s == 0.25
