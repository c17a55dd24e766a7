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
from spdk_kv.engines import Engine, QueueOptions, open_engine, parse_location
from spdk_kv.errors import CorruptionError, DeviceError, SpdkKvError
from spdk_kv.testing import SMALL, Medium, address_of, memory, read, write
from spdk_kv.testing.engines import property_test
from support import blockdev
from support.media import EVERY, KEEPING, image, medium

BLOCK = 4096
SEGMENT = SMALL.segment_nbytes
AREA = 2 << 20
LARGE = 64 << 10
OPTIONS = QueueOptions(depth=4, segment_nbytes=3 * LARGE, hugepages=False)


@pytest.fixture(params=EVERY)
def each(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


def moved(
    engine: Engine, op: int, places: list[tuple[int, int]], shift: int, together: bool = False
) -> int:
    """How many commands it takes to move (offset, nbytes) from, or to, memory that lies apart, or
    ``together``: one behind the other."""
    before = engine.stats()["ios"]
    transfer = engine.transfer(op, checksum=True)
    whole = memory(sum(nbytes for _, nbytes in places), shift)
    transfer.keep(whole)
    first = 0
    for offset, nbytes in places:
        at = whole[first:] if together else memory(nbytes, shift)
        first += nbytes
        transfer.keep(at)
        transfer.add(offset, address_of(at), nbytes)
    engine.run(transfer)
    return int(engine.stats()["ios"] - before)


@pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("op", [WRITE, READ], ids=["write", "read"])
def test_blocks_that_follow_each_other_are_one_command(each: Medium, op: int, shift: int) -> None:
    # By way of a slot, in an engine that has slots.
    most = SEGMENT // BLOCK if each.engine.block_nbytes > 1 else 1
    row = [(number * BLOCK, BLOCK) for number in range(2 * SEGMENT // BLOCK)]
    assert moved(each.engine, op, row, shift) == len(row) // most
    # One that is missing ends a command, and so does one that comes too early.
    assert moved(each.engine, op, row[:3] + row[4:7], shift) == (2 if most > 1 else 6)
    assert moved(each.engine, op, [*row[:3], row[2], row[3]], shift) == (2 if most > 1 else 5)
    # Behind one that ends within a block comes the next block.
    short = [(0, 100), (BLOCK, BLOCK - 1), (2 * BLOCK, BLOCK)]
    assert moved(each.engine, op, short, 64) == (1 if most > 1 else 3)


@pytest.mark.parametrize("op", [WRITE, READ], ids=["write", "read"])
def test_what_lies_together_in_memory_as_well_is_not_copied(each: Medium, op: int) -> None:
    row = [(number * BLOCK, BLOCK) for number in range(2 * SEGMENT // BLOCK)]
    # Threads that copy from the page cache, and sum, each take one.
    commands = len(row) if each.engine.name == "pagecache" else 2
    assert moved(each.engine, op, row, 0, together=True) == commands
    assert each.engine.stats()["bounced_nbytes"] == 0


@pytest.mark.parametrize("op", [WRITE, READ], ids=["write", "read"])
@pytest.mark.parametrize(
    ("kind", "commands"), [("uring-file", 2), ("threads-file", 2), ("pagecache-file", 8)]
)
def test_large_pieces_are_not_copied_either(kind, commands, op, tmp_path) -> None:
    """A command may have a list of places."""
    options = QueueOptions(depth=4, segment_nbytes=4 * LARGE, hugepages=False)
    with medium(kind, tmp_path, options) as found:
        row = [(number * LARGE, LARGE) for number in range(8)]
        assert moved(found.engine, op, row, 0) == commands
        assert found.engine.stats()["bounced_nbytes"] == 0


class Piece(NamedTuple):
    gap: int
    """Blocks before it that belong to none."""
    nbytes: int
    shift: int
    """Its memory, past a page; None: behind that of the one before it."""


pieces = st.lists(
    st.builds(
        Piece,
        st.sampled_from([0, 0, 0, 1]),
        st.one_of(
            st.sampled_from([1, BLOCK, 2 * BLOCK, LARGE, OPTIONS.segment_nbytes + BLOCK]),
            st.integers(1, 3 * BLOCK),
        ),
        st.sampled_from([0, 0, 64, None]),
    ),
    min_size=1,
    max_size=9,
)


def laid_out(row: list[Piece], lengths: list[int]) -> list[np.ndarray]:
    """Memory of ``lengths`` for pieces, as each says where it lies."""
    found: list[np.ndarray] = []
    at, room = 0, memory(0)
    for number, (piece, nbytes) in enumerate(zip(row, lengths, strict=True)):
        if piece.shift is not None or not found:
            room, at = memory(sum(lengths[number:]), piece.shift or 0), 0
        found.append(room[at : at + nbytes])
        at += nbytes
    return found


@pytest.mark.parametrize("kind", KEEPING)
def test_bytes_and_checksums_are_each_pieces_own(kind, tmp_path) -> None:
    with medium(kind, tmp_path, OPTIONS) as found:

        @property_test
        @given(pieces, st.integers(0, 99))
        def check(row: list[Piece], seed: int) -> None:
            rng = np.random.default_rng(seed)
            offset, places, wanted = 0, [], bytearray(b"\xa5" * AREA)
            found.poke(0, bytes(wanted))
            writes = found.engine.transfer(WRITE, checksum=True)
            sums = []
            sources = laid_out(row, [piece.nbytes for piece in row])
            for piece, source in zip(row, sources, strict=True):
                offset += piece.gap * BLOCK
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
            # Those that begin within a block, too.
            skips = [min(piece.nbytes - 1, int(rng.choice([0, 0, 0, 5]))) for piece in row]
            lengths = [piece.nbytes - skip for piece, skip in zip(row, skips, strict=True)]
            outs = laid_out([*row, row[0]], [*lengths, 1])
            for out in outs:
                out[:] = 0x5A
            for (offset, _), skip, out in zip(places, skips, outs, strict=False):
                reads.add(offset + skip, address_of(out), len(out))
            found.engine.run(reads)
            for number, ((offset, _), skip) in enumerate(zip(places, skips, strict=True)):
                expected = bytes(wanted[offset + skip : offset + skip + lengths[number]])
                assert outs[number].tobytes() == expected
                assert reads.crc(number) == crc32c(expected)
            assert outs[-1] == 0x5A  # behind the last, or elsewhere

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
        assert moved(failing, READ, row[:2], shift) == 1
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
