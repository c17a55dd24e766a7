"""Sequences make room as blobs do: the ones used longest ago, never one in use or pinned."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import spdk_kv
from sequence.helpers import Reference
from spdk_kv.errors import CapacityError, KeyNotFound
from store.helpers import bytes_of, check_books, folder_fixture, kill_loop, open_store, reopen
from support.rounds import rounds

folder = folder_fixture

SHAPE = spdk_kv.KVShape(2, 2, 64, torch.float16, 512)  # 4 extents of 128 KiB
MIB = 1 << 20


def stored(store: spdk_kv.KVStore, name: str, tokens: int = 100, **options: bool) -> Reference:
    """A sequence that nobody holds any more."""
    sequence = store.sequence(name, SHAPE)
    reference = Reference(SHAPE, seed=sum(name.encode()))
    reference.append(sequence, tokens)
    sequence.pinned = options.get("pinned", False)
    return reference


def blob(number: int, mib: int = 1) -> torch.Tensor:
    return torch.full((mib * MIB // 4,), number, dtype=torch.int32)


def test_the_one_used_longest_ago_goes(folder):
    with open_store(folder, capacity="4 MiB") as store:
        references = {f"s{n}": stored(store, f"s{n}") for n in range(8)}
        store.flush()
        references["s0"].check(store.sequence("s0"))
        store.flush()  # which notices that nobody holds it
        references["s8"] = stored(store, "s8")
        assert store.sequences() == ["s0", *(f"s{n}" for n in range(2, 9))]
        assert store.stats()["evictions"] == 1
        with pytest.raises(KeyNotFound):
            store.sequence("s1")
        for name in store.sequences():
            references[name].check(store.sequence(name))
        check_books(store)


def test_one_in_use_and_a_pinned_one_stay(folder):
    with open_store(folder, capacity="4 MiB") as store:
        held = store.sequence("held", SHAPE)
        reference = Reference(SHAPE)
        reference.append(held, 50)
        pinned = stored(store, "pinned", pinned=True)
        temporary = store.sequence("t", SHAPE, temporary=True)
        for n in range(20):
            stored(store, f"s{n}")
        assert {"held", "pinned", "t", "s19"} <= set(store.sequences())
        reference.check(held)
        assert temporary.tokens() == 0
    with reopen(folder) as store:
        for n in range(20, 40):
            stored(store, f"s{n}")
        assert "pinned" in store.sequences()
        assert "held" not in store.sequences()
        assert store.sequence("pinned").pinned
        pinned.check(store.sequence("pinned"))
        store.sequence("pinned").pinned = False
        for n in range(40, 60):
            stored(store, f"s{n}")
        assert "pinned" not in store.sequences()
        check_books(store)


def test_blobs_and_sequences_go_in_the_order_of_their_last_use(folder):
    with open_store(folder, capacity="8 MiB", eviction="lru") as store:
        for n in range(4):
            store.put(f"b{n}", blob(n))
        for n in range(8):
            stored(store, f"s{n}")
        store.flush()
        for n in range(4):
            store.get(f"b{n}")
        store.put("new", blob(9, 2))  # the blobs are younger than the sequences
        assert len(store) == 5
        assert store.sequences() == [f"s{n}" for n in range(4, 8)]
        for n in range(4, 8):
            assert store.sequence(f"s{n}").tokens() == 100
        store.flush()
        store.put("newer", blob(10, 2))
        assert store.sequences() == [f"s{n}" for n in range(4, 8)], "older blobs were there"
        assert "new" in store
        check_books(store)


@pytest.mark.parametrize(("eviction", "stays"), [("slru", True), ("lru", False)])
def test_a_flood_of_blobs_that_come_once_drives_out_no_sequence(folder, eviction, stays):
    with open_store(folder, capacity="8 MiB", eviction=eviction) as store:
        stored(store, "s")
        store.flush()
        for n in range(60):  # several times the store
            store.put(f"b{n}", blob(n)[: MIB // 16])
        assert (store.sequences() == ["s"]) == stays
        check_books(store)


def test_the_order_of_use_outlives_the_store(folder):
    with open_store(folder, capacity="4 MiB") as store:
        references = {f"s{n}": stored(store, f"s{n}") for n in range(8)}
    with reopen(folder) as store:
        for name in ("s0", "s1"):
            references[name].check(store.sequence(name))
    with reopen(folder) as store:
        for n in range(8, 14):
            references[f"s{n}"] = stored(store, f"s{n}")
        assert set(store.sequences()) == {"s0", "s1", *(f"s{n}" for n in range(8, 14))}
        for name in store.sequences():
            references[name].check(store.sequence(name))


def test_nothing_is_evicted_for_what_can_not_be_met(folder):
    with open_store(folder, capacity="4 MiB") as store:
        for n in range(4):
            stored(store, f"s{n}")
        store.put("b", blob(1))
        held = store.sequence("held", SHAPE)
        with pytest.raises(
            CapacityError, match=r"nothing was evicted.*in use, temporary or pinned"
        ):
            store.put("large", blob(2, 4))
        with pytest.raises(CapacityError, match=r"store\.sequence\(name\)\.delete\(\)"):
            store.sequence("too long", spdk_kv.KVShape(2, 2, 64, torch.float16, 8192))
        assert store.sequences() == ["held", *(f"s{n}" for n in range(4))]
        assert "b" in store
        store.put("fits", blob(3, 3))
        assert store.sequences() == ["held"]
        assert held.tokens() == 0
        check_books(store)


def test_without_eviction_nothing_goes(folder):
    with open_store(folder, capacity="4 MiB", eviction="none") as store:
        for n in range(8):
            stored(store, f"s{n}")
        with pytest.raises(CapacityError, match=r"4\.0 MiB belong to sequences"):
            store.put("b", blob(1))
        assert len(store.sequences()) == 8


def test_what_others_have_as_well_stays(folder):
    with open_store(folder, capacity="8 MiB") as store:
        reference = stored(store, "parent", 500)
        parent = store.sequence("parent")
        children = [parent.fork(f"c{n}", tokens=400) for n in range(3)]
        store.flush()
        del parent
        held = children[0]
        del children
        gc.collect()
        for n in range(30):
            stored(store, f"s{n}")
        assert "c0" in store.sequences()
        assert "parent" in store.sequences(), "nothing would come free with it"
        k, _ = held.read(1)
        assert bytes_of(k) == bytes_of(reference.layers[1][0][:, :, :400])
        check_books(store)


def test_only_both_together_make_room(folder):
    with open_store(folder, capacity="4 MiB") as store:
        for n in range(3):
            stored(store, f"s{n}")
            store.put(f"b{n}", blob(n)[: 512 * 256])  # 512 KiB, between two sequences
        store.flush()
        store.put("large", blob(7, 3))
        assert torch.equal(store.get("large"), blob(7, 3))
        check_books(store)


def test_a_fork_makes_room_for_its_end(folder):
    with open_store(folder, capacity="4 MiB") as store:
        sequence = store.sequence("s", SHAPE)
        reference = Reference(SHAPE)
        reference.append(sequence, 100)
        for n in range(20):
            stored(store, f"o{n}")
        forks = [sequence.fork(f"f{n}") for n in range(10)]
        for forked in forks:
            reference.check(forked)
        check_books(store)


def test_sixteen_threads_in_a_store_that_is_full(folder):
    failures: list[BaseException] = []
    shape = spdk_kv.KVShape(2, 2, 64, torch.float16)

    def live(store: spdk_kv.KVStore, number: int) -> None:
        try:
            for turn in range(6):
                name = f"{number} {turn}"
                sequence = store.sequence(name, shape)
                reference = Reference(shape, seed=1000 * number + 50 * turn)
                for count in (70, 1, 33):
                    reference.append(sequence, count)
                    reference.check(sequence)
                forked = sequence.fork(tokens=80)
                assert forked.tokens() == 80
                forked.delete()
                store.put(f"blob {number}", blob(number)[: 4096 * (number + 1)])
        except BaseException as failure:
            failures.append(failure)

    with open_store(folder, capacity="16 MiB") as store:
        threads = [threading.Thread(target=live, args=(store, n)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        for name in store.sequences():
            sequence = store.sequence(name)
            number, turn = map(int, name.split())
            reference = Reference(shape, seed=1000 * number + 50 * turn)
            for count in (70, 1, 33):
                reference.append(_Sink(), count)
            reference.check(sequence)
        check_books(store)


def test_kills_amid_evictions_and_compactions(folder):
    kills = rounds(30, 200)
    counts = kill_loop(folder, kills, "evicted", 7)
    assert counts["killed"] == kills


class _Sink:
    """Takes tokens, and forgets them."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        pass
