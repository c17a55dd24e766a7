"""Devices that fail, end early, fill up or hang: each really caused, each a typed error."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
import weakref
from contextlib import suppress

import numpy as np
import pytest

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.memory import Pool
from spdk_kv._native.transfer import FLUSH, PREFETCH, READ, WRITE
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.uring import why_unavailable
from spdk_kv.errors import CapacityError, CorruptionError, DeviceError, DeviceGone, DeviceTimeout
from spdk_kv.testing import SMALL, address_of, memory, read, write
from support import blockdev
from support.media import image, medium
from support.subprocesses import run_script
from support.waiting import PATIENCE_S, wait_until

BLOCK = 4096
MIB = 1 << 20
_LOOP_CLR_FD = 0x4C01  # linux/loop.h
FILE_ENGINES = ["uring", "threads", "pagecache"]


def opened(engine: str, path: str, options: QueueOptions = SMALL):
    scheme = "block" if path.startswith("/dev/") else "file"
    return open_engine(parse_location(f"{scheme}://{path}"), path, engine=engine, options=options)


@pytest.mark.parametrize("kind", [f"{engine}-file" for engine in FILE_ENGINES])
def test_a_file_truncated_behind_the_engine_is_corruption(kind, tmp_path):
    with medium(kind, tmp_path) as found:
        engine = found.engine
        found.poke(0, b"\xee" * MIB)
        os.truncate(found.path, MIB // 2 + 100)
        end = MIB // 2 + 100
        assert read(engine, 0, end) == b"\xee" * end
        assert read(engine, end - 50, 50) == b"\xee" * 50
        for offset, nbytes in ((0, MIB), (end - 50, 51), (MIB // 2, 101), (MIB, BLOCK), (end, 1)):
            into = memory(nbytes, 1)
            into[:] = 0x11
            transfer = engine.transfer(READ, checksum=True)
            transfer.add(offset, address_of(into), nbytes)
            with pytest.raises(CorruptionError, match="truncated"):
                engine.run(transfer)
            past = into[max(end - offset, 0) :]
            assert set(past.tolist()) == {0x11}, "bytes past the end reached the caller"
        assert read(engine, 0, 100) == b"\xee" * 100


def _run_to_the_medium(engine, transfer) -> None:
    """Through the page cache a full disk may show only when the bytes leave it."""
    engine.run(transfer)
    engine.flush()


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_full_disk_is_a_capacity_error_and_takes_no_space(engine, tmp_path):
    with blockdev.ext4(tmp_path, 32 * MIB) as at:
        path = at / "data"
        grown = opened(engine, str(path))
        grown.ensure(MIB)
        size = path.stat().st_size
        free = os.statvfs(at).f_bfree
        with pytest.raises(CapacityError, match="no room for"):
            grown.ensure(100 * MIB)
        assert path.stat().st_size == size
        assert os.statvfs(at).f_bfree >= free - 2, "the part that fitted was kept"
        # A hole that nothing is left to fill: the write itself meets the full disk.
        os.truncate(path, 64 * MIB)
        filler = os.open(at / "filler", os.O_CREAT | os.O_WRONLY)
        statistics = os.statvfs(at)
        os.posix_fallocate(filler, 0, (statistics.f_bavail - 16) * statistics.f_frsize)
        transfer = grown.transfer(WRITE)
        source = memory(4 * MIB)
        transfer.add(32 * MIB, address_of(source), len(source))
        with pytest.raises(CapacityError, match="filesystem is full"):
            _run_to_the_medium(grown, transfer)
        write(grown, 0, b"what has room")
        assert read(grown, 0, 13) == b"what has room"
        os.ftruncate(filler, 0)
        os.close(filler)
        write(grown, 32 * MIB, b"room again")
        grown.close()


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_device_that_fails_reads_is_a_device_error_and_neighbours_are_well(engine, tmp_path):
    backing = image(tmp_path)
    with blockdev.loop_device(backing) as node:
        failing = opened(engine, node)
        write(failing, 0, b"\x42" * MIB)
        failing.flush()
        os.truncate(backing, MIB)  # the drive answers EIO beyond it
        outcomes: list[object] = []

        def good() -> None:
            try:
                for _ in range(100):
                    outcomes.append(read(failing, 0, 64 << 10) == b"\x42" * (64 << 10))
            except Exception as failure:
                outcomes.append(failure)

        threads = [threading.Thread(target=good) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            with pytest.raises(DeviceError, match="EIO") as caught:
                read(failing, 4 * MIB, 256 << 10)
            assert caught.value.status == errno.EIO
            assert caught.value.op == "read"
            assert 4 * MIB <= caught.value.offset < 4 * MIB + (256 << 10)
            assert node in str(caught.value)
        for thread in threads:
            thread.join(PATIENCE_S)
        assert outcomes == [True] * 300
        assert failing.stats()["errors"] == 50
        failing.close()


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_past_the_end_of_a_device_is_an_error(engine, tmp_path):
    with blockdev.loop_device(image(tmp_path)) as node:
        small = opened(engine, node)
        end = small.capacity_nbytes
        assert end == (tmp_path / "medium.img").stat().st_size
        with pytest.raises(CorruptionError):
            read(small, end - BLOCK, 2 * BLOCK)
        with pytest.raises((CapacityError, DeviceError)):
            write(small, end, bytes(BLOCK))
        assert len(read(small, end - BLOCK, BLOCK)) == BLOCK
        small.close()


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_device_that_is_not_there_is_gone(engine, tmp_path):
    if os.geteuid():
        pytest.skip("making a device node needs root")
    node = tmp_path / "absent"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(254, 77))  # a range for local use
    with pytest.raises(DeviceGone):
        opened(engine, str(node))


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_device_taken_away_while_open_fails_every_transfer(engine, tmp_path):
    with blockdev.loop_device(image(tmp_path)) as node:
        lost = opened(engine, node)
        until = time.monotonic() + PATIENCE_S
        with suppress(OSError):  # gone, as wanted; sooner, somebody else may have it open, too
            while time.monotonic() < until:
                fcntl.ioctl(lost.fd, _LOOP_CLR_FD)
                time.sleep(0.01)
        for _ in range(3):
            with pytest.raises((DeviceError, CorruptionError)):
                read(lost, 0, MIB)
            with pytest.raises((DeviceError, CapacityError)):
                write(lost, 0, bytes(MIB))
        lost.close()


class Kept:
    """Something whose end can be seen."""


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_hung_device_times_out_and_keeps_the_memory_until_it_lets_go(engine, tmp_path):
    with blockdev.hung_device(tmp_path, 8 * MIB) as device:
        hung = opened(engine, device.node)
        write(hung, 0, b"before".ljust(BLOCK, b"\0"))
        pool = Pool(hung.allocate, 0)
        lease, kept = pool.lease(256 << 10), Kept()
        held, alive = lease.capacity, weakref.ref(kept)
        np.frombuffer(lease, np.uint8)[:] = 0x77
        transfer = hung.transfer(WRITE, checksum=True)
        transfer.keep(lease)
        transfer.keep(kept)
        transfer.add(0, lease.address, 256 << 10)
        device.freeze()
        begun = time.monotonic()
        with pytest.raises(DeviceTimeout, match="deadline") as caught:
            hung.run(transfer, timeout_s=0.3)
        assert time.monotonic() - begun > 0.25
        assert device.is_frozen  # it was not that which ended the wait
        assert caught.value.status == errno.ETIMEDOUT
        assert not transfer.done
        assert transfer.in_flight
        # Nobody holds the transfer any more: only the device does.
        del transfer, lease, kept, caught
        late = hung.start(filled(hung, 0x55, 4 * MIB), lambda t: t.wait(), timeout_s=0.2)
        assert late.result(PATIENCE_S) == errno.ETIMEDOUT
        assert device.is_frozen
        assert pool.leased_nbytes == held
        assert alive() is not None
        device.thaw()
        wait_until(lambda: alive() is None, "the memory was never given back")
        assert pool.leased_nbytes == 0
        write(hung, 0, b"after".ljust(BLOCK, b"\0"))
        hung.flush(timeout_s=PATIENCE_S)
        assert read(hung, 0, BLOCK) == b"after".ljust(BLOCK, b"\0")
        hung.close()


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_full_deep_queue_on_a_hung_device_holds_up_no_deadline_and_no_cancelling(
    engine, tmp_path
):
    with blockdev.hung_device(tmp_path, 8 * MIB) as device:
        options = QueueOptions(depth=64, segment_nbytes=BLOCK, hugepages=False)
        hung = opened(engine, device.node, options)
        device.freeze()
        cancelled = filled(hung, 6, 6 * MIB)  # of 16 commands, as each
        writes = [cancelled]
        cancelled.submit()
        # Of those whose deadline passes before the queue comes to them nothing is in flight.
        for timeout_s in (0.2, 2, 20):
            late = [filled(hung, value, value * MIB) for value in range(1, 6)]
            writes += late
            for each in late:
                each.submit(timeout_s=timeout_s)
            for each in late:
                assert each.wait() == errno.ETIMEDOUT
            if hung.stats()["deepest"] == 64:
                break
        assert hung.stats()["deepest"] == 64
        assert device.is_frozen
        cancelled.cancel()
        device.thaw()
        assert cancelled.wait() in (0, errno.ECANCELED)
        wait_until(lambda: not any(each.in_flight for each in writes), "they never end")
        write(hung, 0, b"after".ljust(BLOCK, b"\0"))
        assert read(hung, 0, BLOCK) == b"after".ljust(BLOCK, b"\0")
        hung.close()


def filled(engine, value: int, offset: int):
    source = memory(64 << 10)
    source[:] = value
    transfer = engine.transfer(WRITE)
    transfer.keep(source)
    transfer.add(offset, address_of(source), len(source))
    return transfer


def test_a_hung_flush_through_the_page_cache_times_out(tmp_path):
    with blockdev.hung_device(tmp_path, 8 * MIB) as device:
        hung = opened("pagecache", device.node)
        device.freeze()
        write(hung, 0, b"in the cache")
        flush = hung.transfer(FLUSH)
        flush.add(0, 0, 0)
        with pytest.raises(DeviceTimeout):
            hung.run(flush, timeout_s=0.2)
        assert read(hung, 0, 12) == b"in the cache"
        device.thaw()
        hung.flush(timeout_s=PATIENCE_S)
        hung.close()


def test_a_thread_may_end_while_its_writes_hang(tmp_path):
    """They are in the ring under its name, and some kernels cancel them with it."""
    if reason := why_unavailable():
        pytest.skip(reason[0])
    with blockdev.ext4(tmp_path, 96 * MIB) as at:
        folder = blockdev.HungDevice("", at / "data")
        options = QueueOptions(depth=600, segment_nbytes=64 << 10, hugepages=False)
        hung = opened("uring", str(at / "data"), options)
        hung.ensure(32 * MIB)
        write(hung, 0, bytes(32 * MIB))
        data = np.random.default_rng(0).integers(0, 256, 24 * MIB, np.uint8)
        source = memory(len(data))
        source[:] = data
        transfer = hung.transfer(WRITE, checksum=True)
        transfer.add(0, address_of(source), len(source))

        into = memory(BLOCK)
        short = hung.transfer(READ)
        short.add(28 * MIB, address_of(into), BLOCK)

        def begin() -> None:
            transfer.submit(priority=PREFETCH)
            # Before the queue's own thread wakes: so this one sends the writes, in its name.
            hung.run(short)

        folder.freeze()
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        time.sleep(0.2)
        assert not transfer.done
        folder.close()
        hung.wait(transfer)
        assert transfer.crc() == crc32c(data)
        assert read(hung, 0, len(data)) == data.tobytes()
        hung.close()


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_closing_with_a_hung_device_says_so_and_lets_everybody_go(engine, tmp_path):
    with blockdev.hung_device(tmp_path, 8 * MIB) as device:
        script = f"""
            import threading, time
            from pathlib import Path
            hung = opened({engine!r}, {device.node!r})
            device = blockdev.HungDevice({device.node!r}, Path({str(device.backing)!r}))
            device.freeze()
            waiting = filled(hung, 1, 0)
            waiting.submit()
            outcomes = []
            def wait():
                try:
                    hung.wait(waiting)
                except BaseException as failure:
                    outcomes.append(type(failure).__name__)
            thread = threading.Thread(target=wait)
            thread.start()
            def finish(transfer):
                if transfer.status:
                    raise hung.error(transfer)
            future = hung.start(filled(hung, 2, MIB), finish)
            time.sleep(0.1)
            try:
                hung.close(timeout_s=0.3)
            except DeviceTimeout as failure:
                print(failure)
            assert type(future.exception(PATIENCE_S)) is DeviceTimeout
            thread.join(PATIENCE_S)
            assert device.is_frozen
            assert outcomes == ["DeviceTimeout"], outcomes
            device.close()
            time.sleep(0.2)
            print("left")
        """
        preamble = "from engines.test_faults import *\n"
        printed = run_script(script, preamble=preamble).splitlines()
        assert printed == [f"{device.node} still holds memory 0.3 s after close", "left"]
