"""Which thread hands commands to the kernel: io_uring gives their completions back to that one."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spdk_kv._native.transfer import READ
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location
from spdk_kv.testing import address_of, memory, write
from support.waiting import PATIENCE_S

MIB = 1 << 20
SMALL_NBYTES = 16 << 10


@pytest.fixture
def ring(tmp_path) -> Iterator[Engine]:
    """`uring` on a file of 8 MiB."""
    if not Path("/proc/thread-self/io").exists():
        pytest.skip("the kernel does not count what each thread reads (CONFIG_TASK_IO_ACCOUNTING)")
    path = str(tmp_path / "data")
    options = QueueOptions(depth=8, segment_nbytes=256 << 10)
    engine = open_engine(parse_location(f"file://{path}"), path, engine="uring", options=options)
    write(engine, 0, bytes(8 * MIB))
    engine.flush()
    yield engine
    engine.close()


def submitted_here() -> int:
    """Bytes of reads past the page cache that this thread has submitted since it began."""
    for line in Path("/proc/thread-self/io").read_text().splitlines():
        name, count = line.split(": ")
        if name == "read_bytes":
            return int(count)
    raise AssertionError("no read_bytes")


def submitted_by(call: Callable[[], object]) -> int:
    """What this thread submits in ``call``, which is repeated where the thread had to read pages of
    its program again, that the kernel had taken: those count as well."""
    while True:
        faults, before = _read_faults(), submitted_here()
        call()
        found = submitted_here() - before
        if _read_faults() == faults:
            return found


def _read_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def reading(engine: Engine, nbytes: int, shift: int = 0):
    into = memory(nbytes, shift)
    transfer = engine.transfer(READ)
    transfer.keep(into)
    transfer.add(0, address_of(into), nbytes)
    return transfer


@pytest.mark.parametrize("shift", [0, 24], ids=["aligned", "through_a_slot"])
def test_a_small_read_that_finds_the_queue_idle_is_submitted_by_its_caller(ring, shift):
    for _ in range(10):
        found = submitted_by(lambda: ring.run(reading(ring, SMALL_NBYTES, shift)))
        assert found == SMALL_NBYTES
    assert ring.stats()["read_nbytes"] >= 10 * SMALL_NBYTES
    assert ring.queue.active == 0


def test_a_large_read_is_submitted_by_the_queue_s_own_thread(ring):
    assert submitted_by(lambda: ring.run(reading(ring, 8 * MIB))) == 0


def test_nobody_submits_for_others(ring):
    """Whoever did could fall asleep in a page fault afterwards, and they would wait for it."""
    wrong: list[str] = []
    start = threading.Barrier(6)

    def work(number: int) -> None:
        start.wait(PATIENCE_S)
        for round_ in range(60):
            small = (number + round_) % 3 != 0
            nbytes = SMALL_NBYTES if small else 8 * MIB
            found = submitted_by(
                lambda nbytes=nbytes: ring.run(reading(ring, nbytes), timeout_s=PATIENCE_S)
            )
            if found not in (0, SMALL_NBYTES * small):
                wrong.append(f"{found} bytes while reading {nbytes}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not wrong


def test_a_transfer_that_waits_for_nobody_is_not_its_caller_s(ring):
    def start_two() -> None:
        future = ring.start(reading(ring, SMALL_NBYTES), lambda t: t.status)
        assert future.result(PATIENCE_S) == 0
        transfer = reading(ring, SMALL_NBYTES)
        transfer.submit()
        ring.wait(transfer)

    assert submitted_by(start_two) == 0
