"""Forks and growth: sequences that share their beginning, in any order of use and end."""

from __future__ import annotations

import shutil
import tempfile
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import spdk_kv
from sequence.helpers import Reference, begun, shape_of
from spdk_kv import KVShape, LayerShape, Sequence
from spdk_kv.errors import CapacityError, ClosedError, CorruptionError, NameInUse, ShapeMismatch
from spdk_kv.store import KVStore
from store.helpers import check_books, folder_fixture, kill_loop, open_store, reopen
from support.rounds import examples, rounds

folder = folder_fixture


def fork_of(sequence: Sequence, reference: Reference, tokens: int, **options: Any) -> Any:
    """A fork and what it should hold, with tokens of its own to come."""
    forked = sequence.fork(tokens=tokens, **options)
    copy = deepcopy(reference)
    copy.seed += 1_000_003
    copy.layers = [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in reference.layers]
    return forked, copy


@pytest.mark.parametrize("max_tokens", [None, 900])
@pytest.mark.parametrize("granularity", ["layer", "head", "token"])
def test_parent_and_child_go_on_apart(folder, granularity, max_tokens):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, granularity, [150, 37, 1], max_tokens=max_tokens)
        # Within a chunk that is on the drive, in the unfinished one, at the end, and at nothing.
        forks = [fork_of(sequence, reference, tokens) for tokens in (100, 187, 188, 0)]
        reference.append(sequence, 90)
        for forked, copy in forks:
            copy.check(forked)
            copy.append(forked, 70)
            copy.append(forked, 1)
            copy.check(forked, tokens=slice(90, None))
        reference.truncate(sequence, 20)
        reference.append(sequence, 120)
        for forked, copy in forks:
            copy.check(forked)
        reference.check(sequence)
        sequence.delete()
        store.flush()
        for number in range(40):
            store.put(str(number), torch.full((100_000,), number))  # over what came free
        for forked, copy in forks:
            copy.append(forked, 5)
            copy.check(forked)
            forked.delete()
        check_books(store)


def test_what_is_cut_back_into_shared_ground_is_recorded_elsewhere(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [100])
        store.flush()
        _, copy = fork_of(sequence, reference, 80, name="f")
        reference.truncate(sequence, 30)
        store.flush()  # nothing new was appended, but its place on the drive is the fork's
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
        copy.check(store.sequence("f"))
        check_books(store)


def test_the_same_number_of_other_tokens_is_another_fork(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [80])
        first, copy = fork_of(sequence, reference, 75)
        reference.truncate(sequence, 40)
        reference.append(sequence, 40)
        second, other = fork_of(sequence, reference, 75)
        reference.reorder(sequence, [1, 0])
        third, turned = fork_of(sequence, reference, 75)
        for forked, wanted in ((first, copy), (second, other), (third, turned)):
            wanted.check(forked)


def test_nothing_is_copied_but_what_fills_no_chunk(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, _ = begun(store, "layer", [500], max_tokens=None)
        before = store.stats()
        forks = [sequence.fork() for _ in range(5)]
        after = store.stats()
        assert after["used_nbytes"] == before["used_nbytes"]
        assert [forked.nbytes for forked in forks] == [sequence.nbytes] * 5
        k, v = Reference(shape_of()).tokens(1)
        forks[0].append(0, k, v)
        grown = store.stats()["used_nbytes"] - before["used_nbytes"]
        assert 0 < grown <= 4 * 16384, "a chunk of each of its extents"


def test_the_order_of_rows_goes_along(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [100])
        reference.reorder(sequence, [1, 1])
        reference.append(sequence, 20)
        forked, copy = fork_of(sequence, reference, 110, name="f")
        reference.reorder(sequence, [1, 0])
        copy.append(forked, 3)
        copy.check(forked)
        reference.check(sequence)
    with reopen(folder) as store:
        copy.check(store.sequence("f"))


def test_names_and_what_is_refused(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, _ = begun(store, "layer", [10])
        with pytest.raises(NameInUse, match="'s'"):
            sequence.fork("s")
        with pytest.raises(TypeError, match="str"):
            sequence.fork(3)  # type: ignore[arg-type]
        with pytest.raises(ShapeMismatch, match="has 10 tokens, not 11"):
            sequence.fork(tokens=11)
        with pytest.raises(ShapeMismatch, match="not -1"):
            sequence.fork("gone", tokens=-1)
        named = sequence.fork("named")
        temporary = sequence.fork()
        assert (named.temporary, temporary.temporary) == (False, True)
        assert store.sequence("named") is named
        assert sorted(store.sequences()) == sorted(["s", "named", temporary.name])
        store.flush()
        with pytest.raises(NameInUse):
            sequence.fork("named")
        named.delete()
        assert sequence.fork("named").tokens() == 10
        sequence.delete()
        with pytest.raises(ClosedError):
            sequence.fork()
        check_books(store)


def test_a_note_is_recorded_with_the_tokens_and_goes_to_forks(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, _ = begun(store, "layer", [10])
        sequence.note = b"of a model"
        forked = sequence.fork("f")
        forked.note += b", forked"
        with pytest.raises(TypeError, match="bytes"):
            sequence.note = "text"  # type: ignore[assignment]
    with reopen(folder) as store:
        assert store.sequence("s").note == b"of a model"
        assert store.sequence("f").note == b"of a model, forked"
        store.sequence("f").note = b""
        assert store.sequence("f").dirty
        store.flush()
        assert store.sequence_note("f") == b""
        assert store.sequence_note("s") == b"of a model"
        with pytest.raises(spdk_kv.KeyNotFound):
            store.sequence_note("none")


def test_restored_ones_that_share_go_on_apart(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [300], max_tokens=None)
        forked, copy = fork_of(sequence, reference, 290, name="f")
        copy.append(forked, 40)
    with reopen(folder) as store:
        sequence, forked = store.sequence("s"), store.sequence("f")
        reference.append(sequence, 100)
        copy.truncate(forked, 200)
        copy.append(forked, 100)
        reference.check(sequence)
        copy.check(forked)
        sequence.delete()
        copy.append(forked, 300)
        check_books(store)
    with reopen(folder) as store:
        copy.check(store.sequence("f"))
        check_books(store)
        store.sequence("f").delete()
        check_books(store)
        assert store.stats()["used_nbytes"] == 0


def test_damage_in_what_is_shared_is_said_by_all_and_others_are_unharmed(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [300], max_tokens=None)
        fork_of(sequence, reference, 290, name="f")
        other = sequence.fork("other", tokens=10)
        offset = next(sequence._layers[1].contents.ranges(0, 20_000, 20_001))[0]
        store.put("blob", torch.arange(1000))
    with (folder / "data").open("r+b") as data:
        data.seek(offset)
        byte = data.read(1)[0]
        data.seek(offset)
        data.write(bytes([byte ^ 1]))
    with reopen(folder) as store:
        for name in ("s", "f"):
            with pytest.raises(CorruptionError, match="CRC32C differs"):
                store.sequence(name).read(1)
            assert store.sequence(name).read(0)[0].shape[2] >= 290
        other = store.sequence("other")
        assert torch.equal(
            other.read(1)[0].view(torch.uint8), reference.layers[1][0][:, :, :10].view(torch.uint8)
        )
        assert torch.equal(store.get("blob"), torch.arange(1000))


def test_growth_that_finds_no_room_leaves_the_tokens_readable(folder):
    with open_store(folder, capacity="2 MiB", eviction="none") as store:
        sequence, reference = begun(store, "layer", [100], max_tokens=None)
        forked, copy = fork_of(sequence, reference, 100, name="f")

        def fill() -> None:
            for _ in range(100):
                reference.append(sequence, 50)

        with pytest.raises(CapacityError, match="no room"):
            fill()
        # A layer that was appended to before the one that found no room:
        least = min(sequence.tokens(layer) for layer in range(2))
        sequence.truncate(least)
        reference.layers = [(k[:, :, :least], v[:, :, :least]) for k, v in reference.layers]
        reference.check(sequence)
        copy.check(forked)
        store.flush()
        check_books(store)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
        copy.check(store.sequence("f"))
        store.sequence("s").delete()
        store.flush()
        copy.append(store.sequence("f"), 500)


def test_a_sequence_without_a_limit_takes_little_and_grows_in_few_pieces(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [1], max_tokens=None)
        assert store.stats()["used_nbytes"] == 4 * 16384
        for _ in range(400):
            reference.append(sequence, 11)
        assert len(sequence._growth.pieces) <= 9
        reference.check(sequence)
        reference.check(sequence, tokens=slice(1000, 3000))
        used = store.stats()["used_nbytes"]
        assert used <= 2.1 * sequence.nbytes + 4 * 16384
    with reopen(folder) as store:
        reference.append(store.sequence("s"), 1000)
        reference.check(store.sequence("s"))


def test_threads_that_fork_and_go_on(folder):
    failures: list[BaseException] = []
    with open_store(folder, capacity="256 MiB") as store:
        sequence, reference = begun(store, "layer", [200], max_tokens=None)

        def branch(number: int) -> None:
            try:
                for round_ in range(5):
                    forked, copy = fork_of(sequence, reference, 150 + number)
                    copy.seed += 10_000 * number + 100 * round_
                    copy.append(forked, 60)
                    copy.check(forked)
                    forked.delete()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=branch, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        mine = deepcopy(reference)
        for _ in range(30):
            mine.append(sequence, 7)
        for thread in threads:
            thread.join()
        assert not failures, failures
        mine.check(sequence)
        check_books(store)


def unlike() -> KVShape:
    """Latents without like values, keys and values of two dtypes, and a plain layer."""
    layers = [
        LayerShape(1, 48, "bfloat16", value_dim=9),
        LayerShape(2, 8, "float32", value_dtype="bfloat16"),
        LayerShape(3, 20, "float16"),
    ]
    return KVShape.of_layers(layers, None, 2)


@pytest.mark.parametrize("granularity", ["layer", "head", "token"])
def test_layers_and_halves_that_are_unlike(folder, granularity):
    shape = unlike()

    def tokens(layer: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        each, chance = shape.layer(layer), torch.Generator().manual_seed(seed)
        sizes = ((each.head_dim, each.dtype), (each.value_dim, each.value_dtype))
        k, v = (
            torch.randn(2, each.kv_heads, count, dim, generator=chance).to(getattr(torch, dtype))
            for dim, dtype in sizes
        )
        return k, v

    with open_store(folder, capacity="64 MiB") as store:
        sequence = store.sequence("s", shape, granularity=granularity)
        wanted = [tokens(layer, 0, 0) for layer in range(3)]
        for step, count in enumerate((1, 130, 2, 600)):
            for layer in range(3):
                new = tokens(layer, count, 10 * step + layer)
                sequence.append(layer, *new)
                wanted[layer] = tuple(torch.cat(p, 2) for p in zip(wanted[layer], new, strict=True))
        with pytest.raises(ShapeMismatch, match="float32"):
            sequence.append(1, wanted[1][1], wanted[1][1])
        with pytest.raises(ShapeMismatch, match="head_dim=9"):
            sequence.append(0, wanted[0][0], wanted[0][0])
        assert sequence.nbytes == 733 * shape.all_layers_token_nbytes
        sequence.reorder([1, 0])
        forked = sequence.fork("f", tokens=400)

        def check(found: Sequence, count: int) -> None:
            for layer in range(3):
                for got, expected in zip(found.read(layer), wanted[layer], strict=True):
                    assert torch.equal(got, expected[[1, 0]][:, :, :count])
                got = found.read(layer, tokens=slice(100, 140), heads=[0])[1]
                assert torch.equal(got, wanted[layer][1][[1, 0]][:, :1, 100:140])
                assert found.read(layer, tokens=slice(5, 5))[1].shape[2] == 0

        check(sequence, 733)
        check(forked, 400)
    with reopen(folder) as store:
        check(store.sequence("s"), 733)
        check(store.sequence("f"), 400)
        assert store.sequence("s").shape == shape
        check_books(store)


def test_values_of_no_width(folder):
    shape = KVShape.of_layers([LayerShape(1, 64, "float16", value_dim=0)])
    k = torch.randn(1, 1, 500, 64).half()
    with open_store(folder, capacity="64 MiB") as store:
        sequence = store.sequence("s", shape)
        sequence.append(0, k, k[..., :0])
        found, nothing = sequence.read(0)
        assert torch.equal(found, k)
        assert nothing.shape == (1, 1, 500, 0)


class ForkMachine(RuleBasedStateMachine):
    """Sequences that fork, go on, are cut, deleted, flushed, forgotten and opened again, against
    tensors in memory. What a crash leaves is seen in a copy of the folder."""

    def __init__(self) -> None:
        super().__init__()
        self.store: KVStore
        self.open()
        self.held: dict[str, Sequence] = {}
        self.model: dict[str, list[torch.Tensor]] = {}
        self.flushed: dict[str, list[torch.Tensor]] = {}
        self.named = 0
        self.seed = 0

    options: dict[str, Any]
    # 64 rows of 256 bytes to a chunk of 16 KiB.
    shape = KVShape(2, 2, 16, "float32", None, 2)

    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="spdk_kv-test-"))
        self.store = open_store(
            self.folder, capacity="256 MiB", flush_interval_s=None, **self.options
        )

    @initialize()
    def begin(self) -> None:
        self.create()

    def teardown(self) -> None:
        self.held.clear()
        check_books(self.store)
        self.store.close()
        shutil.rmtree(self.folder)

    def new_name(self) -> str:
        self.named += 1
        return f"n{self.named}"

    @rule()
    def create(self) -> None:
        if len(self.model) < 6:
            name = self.new_name()
            self.held[name] = self.store.sequence(name, self.shape)
            self.model[name] = [torch.empty(2, 2, 0, 16)] * 2

    def chosen(self, data: st.DataObject) -> tuple[str, Sequence] | None:
        if not self.model:
            return None
        # By place: the names of temporary ones are random.
        name = list(self.model)[data.draw(st.integers(0, len(self.model) - 1))]
        return name, self.held.get(name) or self.store.sequence(name)

    @rule(data=st.data(), count=st.sampled_from([1, 5, 63, 64, 65, 150]), one=st.booleans())
    def append(self, data: st.DataObject, count: int, one: bool) -> None:
        if found := self.chosen(data):
            name, sequence = found
            for layer in range(1 if one else 2):
                self.seed += 1
                k = torch.randn(2, 2, count, 16, generator=torch.Generator().manual_seed(self.seed))
                sequence.append(layer, k, -k)
                self.model[name][layer] = torch.cat([self.model[name][layer], k], 2)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        if found := self.chosen(data):
            name, sequence = found
            least = min(part.shape[2] for part in self.model[name])
            keep = data.draw(st.integers(0, least))
            sequence.truncate(keep)
            self.model[name] = [part[:, :, :keep] for part in self.model[name]]

    @rule(data=st.data(), is_named=st.booleans(), cut=st.booleans())
    def fork(self, data: st.DataObject, is_named: bool, cut: bool) -> None:
        found = self.chosen(data)
        if found is None or len(self.model) >= 8:
            return
        name, sequence = found
        tokens = None
        if cut:
            least = min(part.shape[2] for part in self.model[name])
            tokens = data.draw(st.integers(0, least))
        forked = sequence.fork(self.new_name() if is_named else None, tokens=tokens)
        self.held[forked.name] = forked
        self.model[forked.name] = [part[:, :, :tokens] for part in self.model[name]]

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if found := self.chosen(data):
            name, sequence = found
            sequence.delete()
            self.held.pop(name, None)
            del self.model[name]

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        if (found := self.chosen(data)) and not found[1].temporary:
            self.held.pop(found[0], None)

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        if found := self.chosen(data):
            self.check(found[1], self.model[found[0]])

    @rule(rows=st.sampled_from([[1, 0], [1, 1]]), data=st.data())
    def reorder(self, rows: list[int], data: st.DataObject) -> None:
        if found := self.chosen(data):
            found[1].reorder(rows)
            self.model[found[0]] = [part[rows] for part in self.model[found[0]]]

    def check(self, sequence: Sequence, wanted: list[torch.Tensor]) -> None:
        for layer, part in enumerate(wanted):
            assert sequence.tokens(layer) == part.shape[2]
            k, v = sequence.read(layer)
            assert torch.equal(k, part)
            assert torch.equal(v, -part)

    @rule()
    def flush(self) -> None:
        self.store.flush()
        self.flushed = {
            name: list(parts)
            for name, parts in self.model.items()
            if name not in self.held or not self.held[name].temporary
        }

    @rule()
    def reopen(self) -> None:
        self.flush()
        self.held.clear()
        self.store.close()
        self.store = reopen(self.folder, flush_interval_s=None, **self.options)
        self.model = {name: list(parts) for name, parts in self.flushed.items()}
        assert sorted(self.store.sequences()) == sorted(self.model)

    @rule()
    def crash(self) -> None:
        with tempfile.TemporaryDirectory(prefix="spdk_kv-test-") as copy:
            left = Path(copy) / "left"
            shutil.copytree(self.folder, left, ignore=shutil.ignore_patterns("residency*"))
            with reopen(left, flush_interval_s=None, **self.options) as store:
                for name, parts in self.flushed.items():
                    # Truncations and deletions may have been recorded since by themselves.
                    if name in self.model and name in store.sequences():
                        found = store.sequence(name)
                        if [found.tokens(n) for n in range(2)] == [p.shape[2] for p in parts]:
                            self.check(found, parts)
                        else:
                            for layer in range(2):
                                found.read(layer)
                check_books(store)


@pytest.mark.parametrize("engine", ["threads", "pagecache"])
def test_forks_are_always_what_was_appended(engine):
    machine = type(f"Machine_{engine}", (ForkMachine,), {"options": {"engine": engine}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(6),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_kills_amid_forks_growth_and_deletions(folder):
    kills = rounds(30, 200)
    counts = kill_loop(folder, kills, "forks", 5)
    assert counts["killed"] == kills
