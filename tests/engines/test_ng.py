"""Engine `ng` without a drive: what Identify tells, what is refused, and the ring on /dev/null.

What it does with a drive is tested inside the lab (tests/lab).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from spdk_kv._native.transfer import DISCARD, FLUSH, READ, WRITE, Queue, Transfer
from spdk_kv.engines import engine_status, open_engine, parse_location
from spdk_kv.engines.ng import Limits, largest_command, parse_identify, read_limits, why_unavailable
from spdk_kv.errors import DeviceError, DeviceGone, EngineUnavailable
from spdk_kv.testing import address_of, memory
from support import blockdev

KIB = 1 << 10
PARTS = 100

needs_ring = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"engine ng: {(why_unavailable() or ('',))[0]}"
)


def namespace_page(
    *, size: int = 1000, selected: int = 0, formats: int = 1, **more: bytes
) -> bytes:
    """Identify Namespace; ``more``: bytes at a place, as ``at_104=...``."""
    page = bytearray(4096)
    struct.pack_into("<QQQ", page, 0, size, size, size)
    page[25], page[26] = formats - 1, selected
    for name, value in more.items():
        at = int(name.removeprefix("at_"))
        page[at : at + len(value)] = value
    return bytes(page)


def controller_page(*, mdts: int = 7, vwc: int = 1, oncs: int = 4) -> bytes:
    page = bytearray(4096)
    page[4:24] = b"S5GXNX0R123456".ljust(20)
    page[24:64] = b"A Model".ljust(40)
    page[64:72] = b"1B2Q".ljust(8)
    page[77], page[525] = mdts, vwc
    struct.pack_into("<H", page, 520, oncs)
    return bytes(page)


def test_identify_is_read_as_the_specification_lays_it_out():
    page = namespace_page(at_128=struct.pack("<HBB", 0, 12, 0))
    found = parse_identify(3, page, controller_page())
    assert (found.nsid, found.serial, found.model, found.firmware) == (
        3, "S5GXNX0R123456", "A Model", "1B2Q",
    )  # fmt: skip
    assert (found.block_nbytes, found.nbytes) == (4096, 1000 * 4096)
    assert found.max_transfer_nbytes == 512 * KIB
    assert found.volatile_write_cache
    assert found.deallocate
    assert (found.nguid, found.eui64, found.metadata_nbytes, found.protection) == ("", "", 0, 0)
    page = namespace_page(
        selected=2,
        formats=3,
        at_136=struct.pack("<HBB", 8, 9, 0),
        at_29=b"\x09",
        at_104=bytes(range(16)),
        at_120=bytes(range(8, 16)),
    )
    found = parse_identify(1, page, controller_page(mdts=0, vwc=0, oncs=0))
    assert (found.block_nbytes, found.metadata_nbytes, found.protection) == (512, 8, 1)
    assert (found.max_transfer_nbytes, found.volatile_write_cache, found.deallocate) == (0, 0, 0)
    assert found.nguid == bytes(range(16)).hex()
    assert found.eui64 == bytes(range(8, 16)).hex()


def test_a_format_beyond_the_sixteenth_has_its_number_in_two_places():
    # Bits 3:0, and 6:5 above them where there are more than sixteen.
    place = {f"at_{128 + 4 * 35}": struct.pack("<HBB", 0, 12, 0)}
    page = namespace_page(selected=0x43, formats=40, **place)
    assert parse_identify(1, page, controller_page()).block_nbytes == 4096
    page = namespace_page(selected=0x43, formats=4, at_140=struct.pack("<HBB", 0, 9, 0))
    assert parse_identify(1, page, controller_page()).block_nbytes == 512


def queue_folder(root: Path, **files: object) -> Path:
    folder = root / "sys/class/block/nvme0n1/queue"
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return root


def test_a_command_carries_what_its_pages_have_segments_for(tmp_path):
    root = queue_folder(tmp_path, max_hw_sectors_kb=2048, max_segments=127, dma_alignment=3)
    assert read_limits("nvme0n1", root) == Limits(126 * 4096, 4)


@pytest.mark.parametrize(
    ("mdts", "shift", "most"),
    [(0, 9, 32 << 20), (0, 12, 64 << 20), (5, 9, 128 * KIB), (9, 12, 2 << 20), (15, 9, 32 << 20)],
)
def test_a_command_has_as_many_blocks_as_its_field_counts(mdts, shift, most):
    """Where neither the drive nor the kernel limits it: more would be cut off, and the command
    would still say that it moved all."""
    page = namespace_page(at_128=struct.pack("<HBB", 0, shift, 0))
    found = parse_identify(1, page, controller_page(mdts=mdts))
    assert largest_command(found, Limits(64 << 20, 4)) == most
    assert largest_command(found, Limits(64 * KIB, 4)) == 64 * KIB


def test_without_dma_alignment_sectors_are_aligned(tmp_path):
    root = queue_folder(tmp_path, max_hw_sectors_kb=128, max_segments=127)
    assert read_limits("nvme0n1", root) == Limits(128 * KIB, 512)


def test_the_limits_of_a_disk_that_is_gone(tmp_path):
    with pytest.raises(DeviceGone, match="nvme0n1"):
        read_limits("nvme0n1", tmp_path)


@needs_ring
@pytest.mark.parametrize("path", ["/dev/null", "/dev/tty", __file__])
def test_what_is_no_generic_node_is_refused(path):
    with pytest.raises(EngineUnavailable, match=r"generic node.*ls /dev/ng"):
        open_engine(parse_location(f"ng://{path}"))


@needs_ring
def test_a_disk_is_refused_with_the_location_to_use(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with (
        blockdev.loop_device(image) as node,
        pytest.raises(EngineUnavailable, match=f"block://{node}"),
    ):
        open_engine(parse_location(f"ng://{node}"))


@needs_ring
def test_a_node_that_is_not_there():
    with pytest.raises(DeviceError, match="ENOENT") as refused:
        open_engine(parse_location("ng:///dev/ng77n1"))
    assert refused.value.status == errno.ENOENT


def test_no_other_engine_serves_it():
    with pytest.raises(ValueError, match="ng alone"):
        open_engine(parse_location("ng:///dev/ng0n1"), engine="uring")


def test_its_status_is_told():
    (status,) = (status for status in engine_status() if status.name == "ng")
    assert status.available == (why_unavailable() is None)
    assert status.available or (status.reason and status.remedy)


@contextmanager
def null_queue(segment_nbytes: int) -> Iterator[Queue]:
    """A queue on /dev/null, which takes any command since 6.0 and moves nothing."""
    from spdk_kv._native.engines.ng import NgBackend

    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 0):
        pytest.skip("/dev/null takes no commands by io_uring before Linux 6.0")
    slots = memory(8 * segment_nbytes)
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    backend = NgBackend(fd, 16, 1, 512)
    queue = Queue(
        backend.backend,
        (backend, slots),
        depth=4,
        segment_nbytes=segment_nbytes,
        block_nbytes=512,
        align_nbytes=4,
        slots=[address_of(slots) + n * segment_nbytes for n in range(8)],
        pid=os.getpid(),
    )
    try:
        yield queue
    finally:
        assert queue.close(10.0)
        backend.close()
        os.close(fd)


@needs_ring
def test_commands_to_the_null_device_all_come_back():
    """The ring alone is looked at."""
    side = memory(64 * KIB)
    side[:] = 0xA5
    with null_queue(16 * KIB) as queue:
        offsets = np.arange(PARTS, dtype=np.uint64) * np.uint64(64 * KIB)
        for op, nbytes in ((READ, 64 * KIB), (WRITE, 64 * KIB), (DISCARD, 64 * KIB), (FLUSH, 0)):
            transfer = Transfer(queue, op)
            transfer.keep(side)
            address = 0 if op in (DISCARD, FLUSH) else address_of(side)
            transfer.add_many(
                offsets if nbytes else offsets * np.uint64(0),
                np.full(PARTS, address, np.uint64),
                np.full(PARTS, nbytes, np.uint64),
            )
            assert transfer.run(30.0) == 0
        stats = queue.stats()
        assert stats["read_nbytes"] == stats["written_nbytes"] == PARTS * 64 * KIB
        assert set(side.tolist()) == {0xA5}


@needs_ring
@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_command_of_too_many_blocks_is_refused(op):
    most = (1 << 16) * 512
    with null_queue(most + 512) as queue:
        for nbytes, status in ((most, 0), (most + 512, errno.EINVAL)):
            transfer = Transfer(queue, op)
            transfer.add(0, 1 << 20, nbytes)  # the null device touches no memory
            assert transfer.run(30.0) == status
        assert queue.stats()["errors"] == 1


@needs_ring
def test_admin_commands_are_refused_by_what_is_no_drive():
    from spdk_kv._native.engines.ng import identify, namespace_id

    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        for ask in (lambda: namespace_id(fd), lambda: identify(fd, 1, 0)):
            with pytest.raises(OSError, match=r"NVME_IOCTL_ID|Identify") as refused:
                ask()
            assert refused.value.errno == errno.ENOTTY
    finally:
        os.close(fd)
