"""The engine contract: what every engine does with transfers, and with bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spdk_kv._native.checksum import crc32c, crc32c_combine
from spdk_kv._native.transfer import DISCARD, READ, WRITE
from spdk_kv.testing.medium import SMALL, Medium, address_of, memory, read, write

AREA = 256 << 10
BLOCK = 4096
SEGMENT = SMALL.segment_nbytes
CANARY = 0xA5

# All examples of a test may share one engine: each of them writes what it looks at. The classes
# that derive from a contract share its tests.
property_test = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
)

lengths = st.one_of(
    st.integers(1, 3 * SEGMENT),
    st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, SEGMENT - 1, SEGMENT, SEGMENT + 1]),
)
shifts = st.sampled_from([0, 1, 2, 4, 64, 511, 512, 4095])


def pattern(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


class TransferContract:
    """What holds for the transfers of every engine, even one that keeps no bytes (``null``).

    A subclass has the fixture ``medium``, whose engine was opened with :attr:`options`, was not
    used before, and has blocks of at most 4096 bytes.
    """

    options = SMALL
    """What the engine is opened with."""
    area_nbytes = AREA
    """Bytes of the medium that the tests overwrite, from its start."""

    @pytest.fixture
    def medium(self) -> Iterator[Medium]:
        """The open engine, closed afterwards."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `medium`")

    def test_a_transfer_is_cut_at_the_segment_size(self, medium: Medium) -> None:
        engine = medium.engine
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

    def test_nothing_to_move_is_done_at_once(self, medium: Medium) -> None:
        engine = medium.engine
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

    def test_misuse_is_refused_before_any_io(self, medium: Medium) -> None:
        engine = medium.engine
        side = memory(BLOCK)
        with pytest.raises(ValueError, match="unknown operation"):
            engine.transfer(9)
        with pytest.raises(ValueError, match="do not divide"):
            engine.transfer(READ, chunk_nbytes=SEGMENT - BLOCK)
        transfer = engine.transfer(WRITE)
        if engine.block_nbytes > 1:
            with pytest.raises(ValueError, match="multiple of the block size"):
                transfer.add(1, address_of(side), 10)
        with pytest.raises(ValueError, match="no drive"):
            transfer.add(0, address_of(side), 1 << 63)
        with pytest.raises(ValueError, match="differ in length"):
            transfer.add_many(*(np.zeros(n, np.uint64) for n in (1, 2, 1)))
        with pytest.raises(ValueError, match="not submitted"):
            transfer.wait()
        with pytest.raises(ValueError, match="timeout_s"):
            transfer.run(0)
        engine.run(transfer)
        with pytest.raises(ValueError, match="already submitted"):
            engine.run(transfer)
        with pytest.raises(ValueError, match="already submitted"):
            transfer.add(0, 0, 0)
        assert engine.stats()["ios"] == 0


class EngineContract(TransferContract):
    """What every engine that keeps bytes does with them; see the room for an example."""

    @property_test
    @given(
        first=st.integers(0, 8),
        nbytes=lengths,
        shift=shifts,
        room=st.booleans(),
        summed=st.booleans(),
    )
    def test_a_write_puts_its_bytes_and_zeros_to_the_end_of_its_block(
        self, medium: Medium, first: int, nbytes: int, shift: int, room: bool, summed: bool
    ) -> None:
        engine = medium.engine
        medium.poke(0, bytes([CANARY]) * AREA)
        offset = first * BLOCK
        end = -(-nbytes // engine.block_nbytes) * engine.block_nbytes
        source = memory(end, shift)
        data = pattern(nbytes, nbytes)
        source[:] = CANARY  # what lies behind the payload in memory is somebody else's
        source[:nbytes] = np.frombuffer(data, np.uint8)
        transfer = engine.transfer(WRITE, checksum=summed)
        transfer.add(offset, address_of(source), nbytes, end if room else nbytes)
        engine.run(transfer)
        assert medium.peek(offset, nbytes) == data
        assert medium.peek(offset + nbytes, end - nbytes) == bytes(end - nbytes)
        assert set(medium.peek(offset + end, BLOCK)) == {CANARY}
        assert offset == 0 or set(medium.peek(offset - BLOCK, BLOCK)) == {CANARY}
        if not room:
            after = set(source[nbytes:].tolist())
            assert after <= {CANARY}, "a write changed memory it was not given"
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
    def test_a_read_brings_its_bytes_and_touches_no_others(
        self, medium: Medium, first: int, skip: int, nbytes: int, shift: int, summed: bool
    ) -> None:
        engine = medium.engine
        data = pattern(1, AREA)
        medium.poke(0, data)
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
    def test_chunk_checksums_are_those_of_the_chunks(
        self, medium: Medium, chunk_blocks: int, nbytes: int, shift: int, op: int
    ) -> None:
        engine = medium.engine
        chunk = chunk_blocks * BLOCK
        data = pattern(nbytes, nbytes)
        side = memory(nbytes, shift)
        if op == WRITE:
            side[:] = np.frombuffer(data, np.uint8)
        else:
            medium.poke(0, data.ljust(-(-nbytes // BLOCK) * BLOCK, b"\0"))
        transfer = engine.transfer(op, checksum=True, chunk_nbytes=chunk)
        transfer.add(0, address_of(side), nbytes)
        engine.run(transfer)
        wanted = [crc32c(data[at : at + chunk]) for at in range(0, nbytes, chunk)]
        assert np.frombuffer(transfer.chunk_crcs(), "<u4").tolist() == wanted

    def test_many_pieces_go_where_each_belongs(self, medium: Medium) -> None:
        engine = medium.engine
        data = pattern(2, AREA)
        medium.poke(0, data)
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

    def test_memory_the_drive_reaches_is_not_copied(self, medium: Medium) -> None:
        engine = medium.engine
        side = medium.memory(2 * SEGMENT, engine.align_nbytes % BLOCK)
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

    def test_flush_and_discard(self, medium: Medium) -> None:
        engine = medium.engine
        medium.poke(0, bytes([CANARY]) * AREA)
        engine.flush()
        engine.discard(2 * BLOCK, 20 * BLOCK)
        engine.flush()
        assert read(engine, 2 * BLOCK, 20 * BLOCK) == bytes(20 * BLOCK)
        assert set(read(engine, 0, 2 * BLOCK)) == {CANARY}
        assert set(read(engine, 22 * BLOCK, AREA - 22 * BLOCK)) == {CANARY}

    def test_checksums_combine_over_segments(self, medium: Medium) -> None:
        data = pattern(5, 3 * SEGMENT + 77)
        write(medium.engine, 0, data)
        transfer = medium.engine.transfer(READ, checksum=True)
        halves = [memory(len(data) // 2, 3), memory(len(data) - len(data) // 2, 3)]
        cut = len(halves[0])
        transfer.add(0, address_of(halves[0]), cut)
        transfer.add(cut, address_of(halves[1]), len(data) - cut)
        medium.engine.run(transfer)
        whole = crc32c_combine(transfer.crc(0), transfer.crc(1), len(data) - cut)
        assert whole == crc32c(data)
