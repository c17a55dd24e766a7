"""The CUDA link against a stand-in for the driver that keeps to its rules strictly; see
test_gpu.py for a real GPU."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from link.transfers import MIB, noise, over
from spdk_kv._native.checksum import crc32c
from spdk_kv._native.link.cuda import CudaLink
from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.errors import DeviceError, DeviceTimeout, EngineUnavailable
from spdk_kv.link.cuda import measured
from spdk_kv.testing import address_of
from support.media import KEEPING, medium
from support.subprocesses import run_script
from support.waiting import PATIENCE_S

LAUNCH_FAILED, OUT_OF_MEMORY = 719, 2
KINDS = ["ram", "uring-file", "threads-file", "pagecache-file"]
assert set(KINDS) <= set(KEEPING)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the stand-in for CUDA's driver with")
    source = Path(__file__).with_name("stand_in_cuda.c")
    built = tmp_path_factory.mktemp("cuda") / "libstand_in_cuda.so"
    subprocess.run(
        [compiler, "-O1", "-g", "-shared", "-fPIC", "-o", built, source, "-pthread"], check=True
    )
    return str(built)


class Driver:
    """The stand-in, as a program beside ours would use it."""

    def __init__(self, library: str) -> None:
        self.so = ctypes.CDLL(library)
        self.so.standin_fill.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
                                         ctypes.c_size_t]  # fmt: skip
        self.so.standin_use.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_size_t]
        self.so.cuStreamDestroy_v2.argtypes = [ctypes.c_void_p]

    def alive(self) -> list[int]:
        found = (ctypes.c_int * 5)()
        self.so.standin_alive(found)
        return list(found)

    def stream(self) -> int:
        """A stream of the user's."""
        handle, context = ctypes.c_void_p(), ctypes.c_void_p()
        assert self.so.cuDevicePrimaryCtxRetain(ctypes.byref(context), 40) == 0
        self.so.cuCtxPushCurrent_v2(context)
        assert self.so.cuStreamCreate(ctypes.byref(handle), 1) == 0
        self.so.cuCtxPopCurrent_v2(ctypes.byref(context))
        self.so.cuDevicePrimaryCtxRelease_v2(40)
        return handle.value or 0

    def synchronize(self, stream: int) -> None:
        self.so.cuStreamSynchronize(ctypes.c_void_p(stream))


@pytest.fixture
def driver(library, request):
    found = Driver(library)
    before = found.alive()
    assert before[0] == before[3] == before[4] == 0
    yield found
    found.so.standin_hold(0)
    for reset in ("delay", "query", "record", "register"):
        getattr(found.so, f"standin_{reset}")(0)
    request.node.funcargs.clear()  # they hold the engine and the link
    gc.collect()
    # Contexts, streams, registrations, allocations: whatever was taken went back.
    assert found.alive() == before, "something of CUDA's was not given back"


@pytest.fixture(params=KINDS)
def engine(request, tmp_path, driver):
    with medium(request.param, tmp_path) as found:
        yield found.engine
        found.engine.close()


@pytest.fixture
def link(library, driver):
    return CudaLink(library=library)


def test_a_link_gives_back_what_it_took(library, driver) -> None:
    link = CudaLink(library=library)
    assert link.name == "cuda"
    assert link.device_name == "Stand-in"
    assert driver.alive()[:2] == [1, 2]
    memory = Region(MIB)
    held = link.register(memory)
    assert driver.alive()[3] == 1
    with pytest.raises(OSError, match="could not be registered"):
        link.register(memory)
    del link
    assert driver.alive()[3] == 1, "a registration keeps its link"
    del held
    assert driver.alive()[:2] == [0, 0]


def test_what_is_missing_is_an_error_with_its_name(library) -> None:
    with pytest.raises(OSError, match=r"no CUDA driver: .*nowhere\.so"):
        CudaLink(library="nowhere.so")
    with pytest.raises(OSError, match="no GPU 3: CUDA_ERROR_INVALID_DEVICE"):
        CudaLink(3, library=library)
    with pytest.raises(OSError, match="too old: it has no cuInit"):
        CudaLink(library="libm.so.6")


def test_both_ways_exact_bytes_and_sums(engine, link, driver) -> None:
    data = noise(3 * MIB + 17)
    for delay in (0, 30):
        driver.so.standin_delay(delay)
        put = over(engine, link, WRITE, 4096, data, checksum=True)
        engine.run(put, timeout_s=PATIENCE_S)
        assert put.crc() == crc32c(data)
        into = np.full(len(data) + 2, 0xEE, np.uint8)
        got = over(engine, link, READ, 4096 + 5, into[1 : len(data) - 6], checksum=True)
        engine.run(got, timeout_s=PATIENCE_S)
        assert np.array_equal(into[1 : len(data) - 6], data[5:-2])
        assert into[0] == 0xEE
        assert set(into[len(data) - 6 :].tolist()) == {0xEE}
        assert got.crc() == crc32c(data[5:-2])
    # Events are used again: no more than copies at once, both ways.
    assert driver.alive()[2] <= 2 * engine.queue.slots


def test_the_thread_is_left_as_it_was(engine, link, driver) -> None:
    data = noise(MIB)
    assert driver.so.standin_current() == 0
    engine.run(over(engine, link, WRITE, 0, data))
    assert driver.so.standin_current() == 0
    assert driver.so.standin_mode() == 0
    seen = []

    def another() -> None:
        driver.so.standin_become_another()
        engine.run(over(engine, link, READ, 0, data))
        seen.append((driver.so.standin_current(), driver.so.standin_mode()))

    thread = threading.Thread(target=another)
    thread.start()
    thread.join(PATIENCE_S)
    assert seen == [(2, 0)]


def test_a_write_waits_for_the_kernels_that_make_its_bytes(engine, link, driver) -> None:
    stream = driver.stream()
    source = np.zeros(MIB, np.uint8)
    driver.so.standin_delay(20_000)
    driver.so.standin_fill(stream, address_of(source), 0x5A, MIB)
    put = over(engine, link, WRITE, 0, source, stream=stream)
    engine.run(put, timeout_s=PATIENCE_S)
    driver.so.standin_delay(0)
    into = np.zeros(MIB, np.uint8)
    engine.run(over(engine, None, READ, 0, into))
    assert set(into.tolist()) == {0x5A}
    driver.so.cuStreamDestroy_v2(stream)


def test_a_read_waits_for_kernels_that_still_use_its_memory(engine, link, driver) -> None:
    stream = driver.stream()
    data, into = noise(MIB), np.zeros(MIB, np.uint8)
    engine.run(over(engine, None, WRITE, 0, data))
    driver.so.standin_delay(20_000)
    driver.so.standin_fill(stream, address_of(into), 0x5A, MIB)
    engine.run(over(engine, link, READ, 0, into, stream=stream), timeout_s=PATIENCE_S)
    assert np.array_equal(into, data)
    driver.so.cuStreamDestroy_v2(stream)


def test_a_read_is_handed_over_before_its_copies_end(engine, link, driver) -> None:
    stream = driver.stream()
    # No more than there are slots: with fewer, copies have to end before the last can begin.
    data = noise(engine.queue.segment_nbytes * 7 + 3)
    engine.run(over(engine, None, WRITE, 0, data))
    into, used = np.zeros_like(data), np.zeros_like(data)
    driver.so.standin_hold(1)
    read = over(engine, link, READ, 0, into, checksum=True, stream=stream, hand_over=True)
    engine.run(read, timeout_s=PATIENCE_S)
    assert read.status == 0
    assert not read.done
    assert read.crc() == crc32c(data)
    assert not into.any()
    driver.so.standin_use(stream, address_of(used), address_of(into), len(data))
    # A second stream that wants it, and a deadline that passes after the hand-over.
    assert read.wait() == 0
    driver.so.standin_hold(0)
    driver.synchronize(stream)
    assert np.array_equal(used, data), "the stream did not wait for the copies"
    until = time.monotonic() + PATIENCE_S
    while not read.done and time.monotonic() < until:
        time.sleep(0.001)
    assert read.done
    driver.so.cuStreamDestroy_v2(stream)


def test_after_a_hand_over_no_deadline_counts_and_memory_is_kept(engine, link, driver) -> None:
    stream = driver.stream()
    data = noise(MIB // 8)
    engine.run(over(engine, None, WRITE, 0, data))
    into = np.zeros_like(data)
    driver.so.standin_hold(1)
    read = over(engine, link, READ, 0, into, stream=stream, hand_over=True)
    future = engine.start(read, lambda transfer: transfer.wait(), timeout_s=2)
    assert future.result(PATIENCE_S) == 0
    time.sleep(2.2)
    assert read.status == 0
    assert not read.done
    del read
    driver.so.standin_hold(0)
    driver.synchronize(stream)
    engine.run(over(engine, link, READ, 0, np.zeros_like(data)), timeout_s=PATIENCE_S)
    assert np.array_equal(into, data)
    driver.so.cuStreamDestroy_v2(stream)


def test_many_reads_are_handed_over_with_few_slots(engine, link, driver) -> None:
    stream = driver.stream()
    data = noise(4 * MIB)
    engine.run(over(engine, None, WRITE, 0, data))
    driver.so.standin_delay(100)
    for turn in range(5):
        into, used = np.zeros_like(data), np.zeros_like(data)
        read = over(engine, link, READ, 0, into, checksum=True, stream=stream, hand_over=True)
        engine.run(read, timeout_s=PATIENCE_S)
        driver.so.standin_use(stream, address_of(used), address_of(into), len(data))
        driver.synchronize(stream)
        assert np.array_equal(used, data), turn
    driver.so.cuStreamDestroy_v2(stream)


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_refused_copy_is_an_error_with_cuda_s_name(engine, link, driver, op) -> None:
    data = noise(2 * MIB)
    engine.run(over(engine, None, WRITE, 0, data))
    for number in (1, 5, 20):
        engine.use_link(link)
        driver.so.standin_refuse(number, LAUNCH_FAILED)
        with pytest.raises(DeviceError, match="GPU: CUDA_ERROR_LAUNCH_FAILED") as caught:
            engine.run(over(engine, link, op, 4 * MIB if op == WRITE else 0, np.zeros_like(data)))
        assert caught.value.op == ("write" if op == WRITE else "read")
    into = np.zeros_like(data)
    engine.run(over(engine, link, READ, 0, into))
    assert np.array_equal(into, data)


_outlives_everything: list[np.ndarray] = []


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_context_that_died_fails_transfers_and_ends_them(engine, link, driver, op) -> None:
    engine.use_link(link)
    for fault in (driver.so.standin_query, driver.so.standin_record):
        # With a GPU's context its copies die too. The stand-in's go on, and nobody is told when
        # they are over: so the memory stays.
        memory = np.zeros(MIB, np.uint8)
        _outlives_everything.append(memory)
        fault(LAUNCH_FAILED)
        with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
            engine.run(over(engine, link, op, 0, memory), timeout_s=PATIENCE_S)
        fault(0)
    engine.run(over(engine, link, op, 0, np.zeros(MIB, np.uint8)), timeout_s=PATIENCE_S)


def test_a_stream_that_cannot_be_marked_is_an_error_before_anything_moves(
    engine, link, driver
) -> None:
    stream = driver.stream()
    engine.use_link(link)
    before = driver.so.standin_copies()
    driver.so.standin_record(LAUNCH_FAILED)
    read = over(engine, link, READ, 0, np.zeros(MIB, np.uint8), stream=stream, hand_over=True)
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        engine.run(read)
    driver.so.standin_record(0)
    assert driver.so.standin_copies() == before
    driver.so.cuStreamDestroy_v2(stream)


def test_memory_that_cannot_be_registered_is_refused(engine, link, driver) -> None:
    driver.so.standin_register(OUT_OF_MEMORY)
    with pytest.raises(EngineUnavailable, match="CUDA_ERROR_OUT_OF_MEMORY"):
        engine.transfer(READ, link=link)
    driver.so.standin_register(0)
    engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)))


def test_a_copy_that_hangs_meets_its_deadline(engine, link, driver) -> None:
    driver.so.standin_hold(1)
    read = over(engine, link, READ, 0, np.zeros(MIB, np.uint8))
    with pytest.raises(DeviceTimeout):
        engine.run(read, timeout_s=0.2)
    assert not read.done
    driver.so.standin_hold(0)
    engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)), timeout_s=PATIENCE_S)
    assert read.done


def test_the_speed_is_measured(library, driver) -> None:
    link = CudaLink(library=library)
    assert link.copy_time_s(MIB) == 0
    driver.so.standin_delay(200)
    measured(link)
    driver.so.standin_delay(0)
    assert link.copy_time_s(0) > 0
    assert link.copy_time_s(MIB) > 200e-6
    assert link.copy_time_s(MIB, False) > 200e-6


def test_many_threads_on_two_engines(tmp_path, link, driver) -> None:
    outcomes: list[object] = []
    with medium("ram", tmp_path) as one, medium("uring-file", tmp_path) as two:

        def work(number: int) -> None:
            try:
                engine = (one, two)[number % 2].engine
                data, into = noise(MIB, number), np.zeros(MIB, np.uint8)
                for _ in range(10):
                    engine.run(over(engine, link, WRITE, number * MIB, data), timeout_s=PATIENCE_S)
                    into[:] = 0
                    engine.run(over(engine, link, READ, number * MIB, into), timeout_s=PATIENCE_S)
                    outcomes.append(np.array_equal(into, data))
            except Exception as failure:
                outcomes.append(failure)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        for found in (one, two):
            found.engine.close()
    assert outcomes == [True] * 60


def test_the_interpreter_may_exit_in_mid_copy(library) -> None:
    script = f"""
        import numpy as np
        from spdk_kv.testing import SMALL
        from spdk_kv.engines import open_engine, parse_location
        from link.test_cuda import *
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=8 * MIB,
                             options=SMALL)
        driver = Driver({library!r})
        driver.so.standin_delay(1000)
        link = CudaLink(library={library!r})
        made = [over(engine, link, op, 0, np.zeros(4 * MIB, np.uint8)) for op in (READ, WRITE)]
        for transfer in made:
            transfer.submit()
    """
    assert run_script(script) == ""
    assert run_script(script + "    del made, transfer, link\n") == ""
