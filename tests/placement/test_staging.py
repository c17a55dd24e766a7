"""The pool of leases, and the ring's table of registered buffers behind it."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv._native.memory import Pool, Region
from spdk_kv._native.transfer import READ
from spdk_kv.engines.uring import why_unavailable
from spdk_kv.placement import StagingPool, staging
from spdk_kv.testing import address_of, read, write
from support.media import medium
from support.rounds import examples
from support.waiting import PATIENCE_S

PAGE = 4096
MIB = 1 << 20


class Regions:
    """An allocator that counts what it gave out."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.alive: weakref.WeakSet[Counted] = weakref.WeakSet()

    def __call__(self, nbytes: int) -> Counted:
        region = Counted(nbytes)
        self.made.append(nbytes)
        self.alive.add(region)
        return region

    @property
    def alive_nbytes(self) -> int:
        return sum(region.nbytes for region in self.alive)


class Counted:
    def __init__(self, nbytes: int) -> None:
        self._region = Region(nbytes, False)
        self.address = self._region.address
        self.nbytes = self._region.nbytes


@settings(max_examples=examples(300))
@given(st.one_of(st.integers(1, 200_000), st.integers(1, 64 * MIB)))
def test_a_lease_is_whole_pages_and_wastes_little(nbytes):
    lease = Pool(lambda size: Region(size, False), 0).lease(nbytes)
    assert lease.nbytes == len(lease) == memoryview(lease).nbytes == nbytes
    assert lease.address % PAGE == lease.capacity % PAGE == 0
    assert nbytes <= lease.capacity <= max(nbytes + PAGE, nbytes * 1.25)


def test_leases_do_not_overlap_and_are_used_again():
    regions = Regions()
    pool = Pool(regions, 64 * MIB)
    rng = random.Random(0)
    out: list = []
    for step in range(6000):
        if out and rng.random() < 0.45:
            lease, mark = out.pop(rng.randrange(len(out)))
            view = np.frombuffer(lease, np.uint8)
            assert view[0] == view[-1] == mark, "two leases share memory"
            del lease, view
        else:
            lease = pool.lease(rng.choice([1, 100, PAGE, 5000, 20_000, 100_000, 300_000]))
            np.frombuffer(lease, np.uint8)[:] = step % 251
            out.append((lease, step % 251))
            del lease
        assert pool.leased_nbytes == sum(lease.capacity for lease, _ in out) or step % 100
    assert pool.leased_nbytes + pool.free_nbytes <= regions.alive_nbytes
    made = len(regions.made)
    out.clear()
    assert pool.leased_nbytes == 0
    again = [pool.lease(5000) for _ in range(100)]
    assert len(regions.made) == made, "idle memory was not used again"
    del again
    pool.trim(0)
    assert pool.free_nbytes == 0
    assert not list(regions.alive)


def test_small_leases_share_a_region():
    regions = Regions()
    pool = Pool(regions, MIB)
    leases = [pool.lease(PAGE) for _ in range(1024)]
    assert len(regions.made) == 1
    assert len({lease.address for lease in leases}) == 1024


def test_a_view_keeps_its_lease():
    pool = Pool(Regions(), MIB)
    lease = pool.lease(10_000)
    capacity = lease.capacity
    view = memoryview(lease)[5:100]
    array = np.frombuffer(lease, np.uint8)
    for last in ("lease", "view", "array"):
        assert pool.leased_nbytes == capacity
        if last == "lease":
            del lease
        elif last == "view":
            view.release()
        else:
            del array
    assert pool.leased_nbytes == 0


def test_a_lease_keeps_its_pool():
    regions = Regions()
    pool = Pool(regions, 0)
    lease = pool.lease(50_000)
    del pool
    np.frombuffer(lease, np.uint8)[:] = 1
    assert len(regions.alive) == 1
    del lease
    assert not list(regions.alive)


def test_zero_clears_from_a_start_to_the_capacity():
    lease = Pool(Regions(), 0).lease(5000)
    np.frombuffer(lease, np.uint8)[:] = 9
    lease.zero(100)
    view = np.frombuffer(lease, np.uint8)
    assert set(view[:100].tolist()) == {9}
    assert not view[100:].any()


def test_idle_memory_beyond_the_limit_is_given_up():
    regions = Regions()
    pool = Pool(regions, 10 * MIB)
    leases = [pool.lease(5 * MIB) for _ in range(6)]
    held = pool.leased_nbytes
    assert regions.alive_nbytes >= held
    leases.clear()
    assert pool.free_nbytes <= 10 * MIB
    assert regions.alive_nbytes <= 12 * MIB
    assert pool.peak_nbytes == held
    pool.trim()
    assert pool.free_nbytes == regions.alive_nbytes == 0


def test_trim_spares_what_is_leased():
    regions = Regions()
    pool = Pool(regions, 64 * MIB)
    small, large = pool.lease(PAGE), pool.lease(8 * MIB)
    np.frombuffer(small, np.uint8)[:] = 3
    del large
    pool.trim(0)
    assert len(regions.alive) == 1, "the large region, and only that, was idle"
    assert set(np.frombuffer(small, np.uint8).tolist()) == {3}


def test_no_memory_is_an_error_and_the_pool_goes_on():
    pool = Pool(lambda nbytes: Region(nbytes, False), MIB)
    with pytest.raises(MemoryError):
        pool.lease(1 << 60)
    assert pool.leased_nbytes == pool.free_nbytes == 0
    assert len(pool.lease(10)) == 10


class Cudart:
    """What a pool uses of the CUDA runtime, where there is no GPU. ``status``: of registering."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0, "the default kind of registration"
        if not self.status:
            self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_for_a_gpu_idle_memory_is_exchanged_for_registered_memory(monkeypatch):
    regions, cudart = Regions(), Cudart()
    monkeypatch.setattr(staging, "_cuda_runtime", lambda: cudart)
    pool = StagingPool(regions, 64 * MIB)
    leased, idle = pool.lease(PAGE), pool.lease(8 * MIB)
    del idle
    assert len(regions.alive) == 2
    pool.pin_for_gpu()
    assert len(regions.alive) == 1, "idle memory that the GPU does not know would be used again"
    assert not cudart.registered
    idle = pool.lease(8 * MIB)
    assert list(cudart.registered) == [idle.address]
    del idle
    pool.pin_for_gpu()  # every read to a GPU says so
    assert pool.stats()["free_nbytes"] >= 8 * MIB
    del leased
    pool.trim()
    assert pool.stats()["free_nbytes"] == 0
    assert not cudart.registered


def test_memory_that_the_gpu_refuses_is_used_as_it_is(monkeypatch, caplog):
    regions, cudart = Regions(), Cudart(status=2)
    monkeypatch.setattr(staging, "_cuda_runtime", lambda: cudart)
    pool = StagingPool(regions, MIB)
    pool.pin_for_gpu()
    with caplog.at_level("INFO"):
        lease = pool.lease(PAGE)
    assert "could not be registered" in caplog.text
    np.frombuffer(lease, np.uint8)[:] = 1
    assert len(regions.alive) == 1


def test_without_a_gpu_idle_memory_is_kept(monkeypatch):
    monkeypatch.setattr(staging, "_cuda_runtime", lambda: None)
    pool = StagingPool(Regions(), 64 * MIB)
    pool.lease(PAGE)
    kept = pool.stats()["free_nbytes"]
    pool.pin_for_gpu()
    assert 0 < kept == pool.stats()["free_nbytes"]
    pool.shed()
    pool.shed()  # idle since the last call
    assert pool.stats()["free_nbytes"] == 0


class Slow:
    """A region whose making and end both let other threads run, as a registered one's do."""

    def __init__(self, nbytes: int) -> None:
        self._region = Region(nbytes, False)
        self.address, self.nbytes = self._region.address, self._region.nbytes
        gc.collect(0)

    def __del__(self) -> None:
        gc.collect(0)


def test_threads_and_collections_in_the_middle_of_it():
    """What the collector frees may give leases back while the pool is in the middle of one."""
    pool = Pool(Slow, 64 << 10)
    failures: list[BaseException] = []
    before = gc.get_threshold()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            out: list = []
            for _ in range(1500):
                lease = pool.lease(rng.choice([PAGE, 300_000, MIB, 2 * MIB]))
                mark = np.frombuffer(lease, np.uint8)
                mark[:1] = seed
                cycle: list = [lease]
                cycle.append(cycle)  # only the collector ends it
                out.append((lease, mark))
                if len(out) > rng.randrange(6):
                    assert all(view[0] == seed for _, view in out)
                    out.clear()
                del cycle, lease, mark
        except BaseException as failure:
            failures.append(failure)

    gc.set_threshold(5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert not failures
    assert pool.leased_nbytes == 0


@pytest.fixture
def uring(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason[0])
    with medium("uring-file", tmp_path) as found:
        if not found.engine._backend.fixed_buffers:
            pytest.skip("this kernel registers no buffers")
        yield found.engine


def test_registered_regions_come_and_go(uring):
    backend = uring._backend
    before = backend.registered
    regions = [uring.allocate(PAGE) for _ in range(100)]
    assert backend.registered == before + 100
    kept = regions[50]
    regions.clear()
    assert backend.registered == before + 1
    transfer = uring.transfer(READ)
    transfer.add(0, kept.address, PAGE)
    uring.run(transfer)
    del kept
    assert backend.registered == before


def test_more_regions_than_the_table_has_room_for(uring):
    write(uring, 0, b"the bytes".ljust(PAGE, b"\0"))
    regions = [uring.allocate(PAGE) for _ in range(1100)]
    assert uring._backend.registered == 1024
    transfer = uring.transfer(READ)
    for region in regions:
        transfer.add(0, region.address, PAGE)
    uring.run(transfer)
    assert all(bytes(memoryview(region)[:9]) == b"the bytes" for region in regions)
    regions.clear()
    assert uring._backend.registered == 1
    assert read(uring, 0, 9) == b"the bytes"


def test_regions_of_many_threads_keep_their_own_entries(uring):
    write(uring, 0, b"\x5a" * PAGE)
    failures: list[str] = []

    def work() -> None:
        try:
            for _ in range(300):
                region = uring.allocate(PAGE)
                transfer = uring.transfer(READ)
                transfer.keep(region)
                transfer.add(0, region.address, PAGE)
                uring.run(transfer)
                if bytes(memoryview(region)) != b"\x5a" * PAGE:
                    failures.append("read into another region")
        except Exception as failure:
            failures.append(repr(failure))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert uring._backend.registered == 1


def test_a_lease_that_outlives_its_engine_leaves_the_next_ring_alone(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason[0])
    with medium("uring-file", tmp_path) as first:
        outliving = [first.engine.allocate(PAGE) for _ in range(20)]
    with medium("uring-file", tmp_path) as second:
        # Its ring has the descriptor, and its regions the entries, that the first one had.
        regions = [second.engine.allocate(PAGE) for _ in range(20)]
        before = second.engine._backend.registered
        outliving.clear()
        assert second.engine._backend.registered == before
        transfer = second.engine.transfer(READ)
        for region in regions:
            transfer.add(0, region.address, PAGE)
        second.engine.run(transfer)
        array = np.frombuffer(memoryview(regions[0]), np.uint8)
        assert address_of(array) == regions[0].address
