"""Pieces that follow each other on the drive: one command, each to and from its own memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spdk_kv
from spdk_kv._native.checksum import crc32c
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine, open_engine, parse_location
from spdk_kv.errors import CorruptionError, DeviceError, SpdkKvError
from spdk_kv.testing import SMALL, Medium, address_of, memory, read, write
from spdk_kv.testing.engines import property_test
from support import blockdev
from support.media import EVERY, KEEPING, image, medium

BLOCK = 4096
SEGMENT = SMALL.segment_nbytes
AREA = 1 << 20
MIB = 1 << 20


@pytest.fixture(params=EVERY)
def each(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


def most_blocks(engine, shift: int) -> int:
    """How many blocks that lie apart in memory, each ``shift`` past a page, a command moves."""
    if shift % max(engine.align_nbytes, 1):
        return SEGMENT // BLOCK  # by way of a slot, in any engine that has slots
    return SEGMENT // BLOCK if engine.name == "uring" else 1


def moved(engine, op: int, places: list[tuple[int, int]], shift: int) -> int:
    """How many commands it takes to move (offset, nbytes) from, or to, memory that lies apart."""
    before = engine.stats()["ios"]
    transfer = engine.transfer(op, checksum=True)
    for offset, nbytes in places:
        at = memory(nbytes, shift)
        transfer.keep(at)
        transfer.add(offset, address_of(at), nbytes)
    engine.run(transfer)
    return int(engine.stats()["ios"] - before)


@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("op", [WRITE, READ], ids=["write", "read"])
def test_blocks_that_follow_each_other_are_one_command(each: Medium, op: int, shift: int) -> None:
    most = most_blocks(each.engine, shift)
    row = [(number * BLOCK, BLOCK) for number in range(2 * SEGMENT // BLOCK)]
    assert moved(each.engine, op, row, shift) == len(row) // most
    # One that is missing ends a command, and so does one that comes too early.
    assert moved(each.engine, op, row[:3] + row[4:7], shift) == (2 if most > 1 else 6)
    assert moved(each.engine, op, [*row[:3], row[2], row[3]], shift) == (2 if most > 1 else 5)
    # Behind one that ends within a block comes the next block.
    short = [(0, 100), (BLOCK, BLOCK - 1), (2 * BLOCK, BLOCK)]
    assert moved(each.engine, op, short, 64) == (1 if most_blocks(each.engine, 64) > 1 else 3)


class Piece(NamedTuple):
    gap: int
    """Blocks before it that belong to none."""
    nbytes: int
    shift: int


pieces = st.lists(
    st.builds(
        Piece,
        st.sampled_from([0, 0, 0, 1]),
        st.one_of(
            st.sampled_from([1, BLOCK, 2 * BLOCK, SEGMENT, SEGMENT + BLOCK]),
            st.integers(1, 3 * BLOCK),
        ),
        st.sampled_from([0, 0, 64]),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("kind", KEEPING)
def test_bytes_and_checksums_are_each_pieces_own(kind, tmp_path) -> None:
    with medium(kind, tmp_path) as found:

        @property_test
        @given(pieces, st.integers(0, 99))
        def check(row: list[Piece], seed: int) -> None:
            rng = np.random.default_rng(seed)
            offset, places, wanted = 0, [], bytearray(b"\xa5" * AREA)
            found.poke(0, bytes(wanted))
            writes = found.engine.transfer(WRITE, checksum=True)
            sums = []
            for piece in row:
                offset += piece.gap * BLOCK
                source = memory(piece.nbytes, piece.shift)
                source[:] = rng.integers(0, 256, piece.nbytes)
                writes.keep(source)
                writes.add(offset, address_of(source), piece.nbytes)
                # What is left of its last block is zeros, if the drive has blocks.
                unit = found.engine.block_nbytes
                end = offset + -(-piece.nbytes // unit) * unit
                wanted[offset:end] = source.tobytes().ljust(end - offset, b"\0")
                sums.append(crc32c(source))
                places.append((offset, piece))
                offset += -(-piece.nbytes // BLOCK) * BLOCK
            found.engine.run(writes)
            assert found.peek(0, AREA) == wanted
            assert [writes.crc(number) for number in range(len(row))] == sums
            reads = found.engine.transfer(READ, checksum=True)
            outs = []
            for offset, piece in places:
                # Those that begin within a block, too.
                skip = min(piece.nbytes - 1, int(rng.choice([0, 0, 0, 5])))
                out = memory(piece.nbytes - skip + 1, piece.shift)
                out[:] = 0x5A
                reads.add(offset + skip, address_of(out), piece.nbytes - skip)
                outs.append((out, bytes(wanted[offset + skip : offset + piece.nbytes])))
            found.engine.run(reads)
            for number, (out, expected) in enumerate(outs):
                assert out[:-1].tobytes() == expected
                assert out[-1] == 0x5A
                assert reads.crc(number) == crc32c(expected)

        check()


@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("kind", ["uring", "threads"])
def test_the_piece_that_failed_is_named_and_its_slots_come_back(kind, tmp_path, shift) -> None:
    backing = image(tmp_path)
    with blockdev.loop_device(backing) as node, closing(opened(kind, node)) as failing:
        write(failing, 0, b"\x42" * AREA)
        failing.flush()
        os.truncate(backing, 6 * BLOCK)  # the drive answers EIO beyond it
        row = [(number * BLOCK, BLOCK) for number in range(4, 12)]
        # More often than there are slots: one that stayed away would be waited for without end.
        for _ in range(20):
            transfer = failing.transfer(READ, checksum=True)
            for offset, nbytes in row:
                at = memory(nbytes, shift)
                transfer.keep(at)
                transfer.add(offset, address_of(at), nbytes)
            with pytest.raises(DeviceError, match="EIO") as caught:
                failing.run(transfer, timeout_s=60)
            assert caught.value.status == errno.EIO
            offset, nbytes = transfer.failure
            assert offset >= 6 * BLOCK
            assert nbytes == BLOCK
        assert moved(failing, READ, row[:2], shift) == (1 if shift or kind == "uring" else 2)
        assert read(failing, 0, 6 * BLOCK) == b"\x42" * 6 * BLOCK


def opened(kind: str, node: str) -> Engine:
    return open_engine(parse_location(f"block://{node}"), node, engine=kind, options=SMALL)


@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_of_blobs_read_together_only_the_one_that_failed_is_forgotten(
    engine, tmp_path, shift
) -> None:
    store = spdk_kv.open(f"file://{tmp_path}/kv", capacity="8 MiB", engine=engine)
    with store:
        values = {f"{number}": np.full(BLOCK, number, np.uint8) for number in range(8)}
        store.put_many(values)
        store.flush()
        record = store.catalog.records.find(("5",))[0]
        store.catalog.records.unpin([record])
        # The bytes of one blob change, and with them its checksum.
        with open(tmp_path / "kv" / "data", "r+b") as file:
            file.seek(record.offset)
            file.write(b"\xff" * 100)
            file.flush()
            os.fsync(file.fileno())
        outs = [memory(BLOCK, shift) for _ in values]
        with pytest.raises(CorruptionError, match="'5'"):
            store.get_many(list(values), out=outs)
        assert "5" not in store
        del values["5"]
        for out, (key, value) in zip(outs, values.items(), strict=False):
            assert np.array_equal(store.get(key, out=out), value)


@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_many_that_do_not_fit_are_refused_and_leave_what_was_there(engine, tmp_path, shift) -> None:
    """A file that ends amid pieces: all that is in it can be read afterwards, by itself."""
    with medium(f"{engine}-file", tmp_path) as found:
        found.poke(0, bytes(range(256)) * (8 * BLOCK // 256))
        os.truncate(found.path, 5 * BLOCK + 100)
        for _ in range(10):
            transfer = found.engine.transfer(READ)
            outs = [memory(BLOCK, shift) for _ in range(8)]
            for number, out in enumerate(outs):
                transfer.add(number * BLOCK, address_of(out), BLOCK)
            with pytest.raises(SpdkKvError, match="truncated"):
                found.engine.run(transfer, timeout_s=60)
            assert transfer.failure[0] >= 5 * BLOCK
        assert read(found.engine, 0, 5 * BLOCK + 100) == (bytes(range(256)) * 96)[: 5 * BLOCK + 100]
