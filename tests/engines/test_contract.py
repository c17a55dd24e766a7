"""The engine contract: what every engine does with bytes. One suite, on real media."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spdk_kv._native.checksum import crc32c, crc32c_combine
from spdk_kv._native.transfer import DISCARD, READ, WRITE
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.memory import RamEngine
from spdk_kv.errors import EngineUnavailable
from support import blockdev
from support.media import (
    EVERY,
    FILES,
    KEEPING,
    SMALL,
    Medium,
    address_of,
    medium,
    memory,
    read,
    write,
)

AREA = 256 << 10
BLOCK = 4096
SEGMENT = SMALL.segment_nbytes
CANARY = 0xA5

# The fixture may be shared by all examples of a test: each writes what it looks at.
property_test = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=KEEPING)
def keeping(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


@pytest.fixture(params=EVERY)
def any_engine(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


def pattern(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


lengths = st.one_of(
    st.integers(1, 3 * SEGMENT),
    st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, SEGMENT - 1, SEGMENT, SEGMENT + 1]),
)
shifts = st.sampled_from([0, 1, 2, 4, 64, 511, 512, 4095])


@property_test
@given(
    first=st.integers(0, 8), nbytes=lengths, shift=shifts, room=st.booleans(), summed=st.booleans()
)
def test_a_write_puts_its_bytes_and_zeros_to_the_end_of_its_block(
    keeping, first, nbytes, shift, room, summed
):
    engine = keeping.engine
    keeping.poke(0, bytes([CANARY]) * AREA)
    offset = first * BLOCK
    end = -(-nbytes // engine.block_nbytes) * engine.block_nbytes
    source = memory(end, shift)
    data = pattern(nbytes, nbytes)
    source[:] = CANARY  # what lies behind the payload in memory is somebody else's
    source[:nbytes] = np.frombuffer(data, np.uint8)
    transfer = engine.transfer(WRITE, checksum=summed)
    transfer.add(offset, address_of(source), nbytes, end if room else nbytes)
    engine.run(transfer)
    assert keeping.peek(offset, nbytes) == data
    assert keeping.peek(offset + nbytes, end - nbytes) == bytes(end - nbytes)
    assert set(keeping.peek(offset + end, BLOCK)) == {CANARY}
    assert offset == 0 or set(keeping.peek(offset - BLOCK, BLOCK)) == {CANARY}
    if not room:
        assert set(source[nbytes:].tolist()) <= {CANARY}, "a write changed memory it was not given"
    if summed:
        assert transfer.crc() == crc32c(data)


@property_test
@given(
    first=st.integers(0, 8),
    skip=st.one_of(st.just(0), st.integers(1, BLOCK - 1)),
    nbytes=lengths,
    shift=shifts,
    summed=st.booleans(),
)
def test_a_read_brings_its_bytes_and_touches_no_others(keeping, first, skip, nbytes, shift, summed):
    engine = keeping.engine
    data = pattern(1, AREA)
    keeping.poke(0, data)
    offset = first * BLOCK + skip
    into = memory(nbytes + 2 * BLOCK, shift)
    into[:] = CANARY
    transfer = engine.transfer(READ, checksum=summed)
    transfer.add(offset, address_of(into) + BLOCK, nbytes)
    engine.run(transfer)
    assert into[BLOCK : BLOCK + nbytes].tobytes() == data[offset : offset + nbytes]
    assert set(into[:BLOCK].tolist()) == {CANARY}
    assert set(into[BLOCK + nbytes :].tolist()) == {CANARY}
    if summed:
        assert transfer.crc() == crc32c(data[offset : offset + nbytes])


@property_test
@given(
    chunk_blocks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    nbytes=lengths,
    shift=shifts,
    op=st.sampled_from([READ, WRITE]),
)
def test_chunk_checksums_are_those_of_the_chunks(keeping, chunk_blocks, nbytes, shift, op):
    engine = keeping.engine
    chunk = chunk_blocks * BLOCK
    data = pattern(nbytes, nbytes)
    side = memory(nbytes, shift)
    if op == WRITE:
        side[:] = np.frombuffer(data, np.uint8)
    else:
        keeping.poke(0, data.ljust(-(-nbytes // BLOCK) * BLOCK, b"\0"))
    transfer = engine.transfer(op, checksum=True, chunk_nbytes=chunk)
    transfer.add(0, address_of(side), nbytes)
    engine.run(transfer)
    wanted = [crc32c(data[at : at + chunk]) for at in range(0, nbytes, chunk)]
    assert np.frombuffer(transfer.chunk_crcs(), "<u4").tolist() == wanted


def test_many_pieces_go_where_each_belongs(keeping):
    engine = keeping.engine
    data = pattern(2, AREA)
    keeping.poke(0, data)
    rng = np.random.default_rng(3)
    nbytes = rng.integers(0, 20_000, 300)
    offsets = rng.integers(0, AREA - 20_000, 300)
    into = memory(int(nbytes.sum()) + 1, 1)
    starts = np.concatenate([[0], np.cumsum(nbytes)[:-1]])
    for many in (False, True):
        into[:] = CANARY
        transfer = engine.transfer(READ, checksum=True)
        addresses = starts + address_of(into)
        if many:
            transfer.add_many(*(a.astype(np.uint64) for a in (offsets, addresses, nbytes)))
        else:
            for piece in zip(offsets, addresses, nbytes, strict=True):
                transfer.add(*map(int, piece))
        assert transfer.nbytes == nbytes.sum()
        engine.run(transfer)
        for i, (start, offset, length) in enumerate(zip(starts, offsets, nbytes, strict=True)):
            wanted = data[offset : offset + length]
            assert into[start : start + length].tobytes() == wanted
            assert transfer.crc(i) == crc32c(wanted)
        assert into[-1] == CANARY


def test_a_transfer_is_cut_at_the_segment_size(any_engine):
    engine = any_engine.engine
    side = memory(5 * SEGMENT)
    for op, nbytes, ios in ((WRITE, 5 * SEGMENT, 5), (READ, 4 * SEGMENT + 1, 5), (READ, 1, 1)):
        before = engine.stats()
        transfer = engine.transfer(op)
        transfer.add(0, address_of(side), nbytes)
        engine.run(transfer)
        after = engine.stats()
        assert after["ios"] - before["ios"] == ios
        assert after["transfers"] - before["transfers"] == 1
        assert after["errors"] == 0
    assert sum(after["histogram"].values()) == after["ios"] == 11
    assert after["written_nbytes"] == 5 * SEGMENT
    assert after["read_nbytes"] >= 4 * SEGMENT + 2


def test_memory_the_device_reaches_is_not_copied(keeping):
    engine = keeping.engine
    side = keeping.memory(2 * SEGMENT, engine.align_nbytes % BLOCK)
    for op, nbytes, capacity in (
        (WRITE, SEGMENT + 10, 2 * SEGMENT),
        (READ, SEGMENT + 10, 2 * SEGMENT),
        (READ, SEGMENT, 0),
    ):
        transfer = engine.transfer(op)
        transfer.add(0, address_of(side), nbytes, capacity)
        engine.run(transfer)
    assert engine.stats()["bounced_nbytes"] == 0
    transfer = engine.transfer(READ)
    transfer.add(0, address_of(side), 10)
    engine.run(transfer)
    assert engine.stats()["bounced_nbytes"] == (0 if engine.block_nbytes == 1 else 10)


def test_nothing_to_move_is_done_at_once(any_engine):
    engine = any_engine.engine
    for pieces in (0, 3):
        for op in (READ, WRITE, DISCARD):
            transfer = engine.transfer(op, checksum=True)
            for _ in range(pieces):
                transfer.add(0, 0, 0)
            engine.run(transfer)
            assert transfer.done
            assert transfer.nbytes == 0
            waited = engine.transfer(op)
            for _ in range(pieces):
                waited.add(0, 0, 0)
            assert engine.start(waited, lambda done: done.status).result(10) == 0


def test_flush_and_discard(keeping):
    engine = keeping.engine
    keeping.poke(0, bytes([CANARY]) * AREA)
    engine.flush()
    engine.discard(2 * BLOCK, 20 * BLOCK)
    engine.flush()
    assert read(engine, 2 * BLOCK, 20 * BLOCK) == bytes(20 * BLOCK)
    assert set(read(engine, 0, 2 * BLOCK)) == {CANARY}
    assert set(read(engine, 22 * BLOCK, AREA - 22 * BLOCK)) == {CANARY}


def test_misuse_is_refused_before_any_io(any_engine):
    engine = any_engine.engine
    side = memory(BLOCK)
    with pytest.raises(ValueError, match="unknown operation"):
        engine.transfer(9)
    with pytest.raises(ValueError, match="do not divide"):
        engine.transfer(READ, chunk_nbytes=SEGMENT - BLOCK)
    transfer = engine.transfer(WRITE)
    if engine.block_nbytes > 1:
        with pytest.raises(ValueError, match="multiple of the block size"):
            transfer.add(1, address_of(side), 10)
    with pytest.raises(ValueError, match="no device"):
        transfer.add(0, address_of(side), 1 << 63)
    with pytest.raises(ValueError, match="differ in length"):
        transfer.add_many(*(np.zeros(n, np.uint64) for n in (1, 2, 1)))
    with pytest.raises(ValueError, match="not submitted"):
        transfer.wait()
    with pytest.raises(ValueError, match="timeout_s"):
        transfer.run(0)
    engine.run(transfer)
    for again in (lambda: engine.run(transfer), lambda: transfer.add(0, 0, 0)):
        with pytest.raises(ValueError, match="already submitted"):
            again()
    assert engine.stats()["ios"] == 0


@pytest.mark.parametrize("kind", FILES)
def test_a_file_grows_and_is_private(kind, tmp_path):
    before = os.umask(0o777)
    try:
        path = tmp_path / "new.data"
        name = kind.partition("-")[0]
        engine = open_engine(parse_location(str(tmp_path)), str(path), engine=name, options=SMALL)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    engine.ensure(1 << 20)
    assert path.stat().st_size >= 1 << 20
    assert engine.capacity_nbytes is None
    write(engine, 12 * BLOCK, b"hello")
    assert read(engine, 12 * BLOCK, 5) == b"hello"
    engine.close()


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_filesystem_without_direct_io_is_refused_with_the_remedy(engine, tmp_path):
    with blockdev.ramfs(tmp_path / "ramfs") as folder:
        location = parse_location(str(folder))
        with pytest.raises(EngineUnavailable, match="pagecache"):
            open_engine(location, str(folder / "data"), engine=engine)
        chosen = open_engine(location, str(folder / "data"))
        assert chosen.name == "pagecache"
        chosen.close()


def test_options_and_sizes_are_checked():
    for wrong in ({"depth": 0}, {"depth": 5000}, {"segment_nbytes": 5000}, {"segment_nbytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QueueOptions(**wrong)
    with pytest.raises(ValueError, match="capacity"):
        RamEngine(0, SMALL)
    with pytest.raises(ValueError, match="served by"):
        open_engine(parse_location("null://"), engine="uring")


def test_checksums_combine_over_segments(keeping):
    data = pattern(5, 3 * SEGMENT + 77)
    write(keeping.engine, 0, data)
    transfer = keeping.engine.transfer(READ, checksum=True)
    halves = [memory(len(data) // 2, 3), memory(len(data) - len(data) // 2, 3)]
    cut = len(halves[0])
    transfer.add(0, address_of(halves[0]), cut)
    transfer.add(cut, address_of(halves[1]), len(data) - cut)
    keeping.engine.run(transfer)
    whole = crc32c_combine(transfer.crc(0), transfer.crc(1), len(data) - cut)
    assert whole == crc32c(data)
