"""Transfers over the emulated link where copies fail or hang: nothing is lost, nothing reused."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from link.transfers import FAST, MIB, SEGMENT, noise, over, without_a_slot
from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.memory import Pool
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.errors import DeviceError, DeviceTimeout
from spdk_kv.testing import SMALL, Medium
from support import blockdev
from support.media import KEEPING, medium
from support.waiting import PATIENCE_S, wait_until


@pytest.fixture(params=[k for k in KEEPING if not k.endswith("partition")])
def keeping(request, tmp_path) -> Iterator[Medium]:
    with medium(request.param, tmp_path) as found:
        yield found


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("number", [1, 7, 60])
def test_a_copy_that_fails_fails_the_transfer_and_the_next_one_is_well(
    keeping, op, at_once, number
) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    data = noise(3 * MIB)
    engine.run(over(engine, None, WRITE, 0, data))
    view = np.zeros_like(data)
    link.fail(number, at_once=at_once)
    words = "refused" if at_once else "on its way"
    with pytest.raises(DeviceError, match=f"{'from' if op == WRITE else 'to'} the GPU.*{words}"):
        engine.run(over(engine, link, op, 4 * MIB if op == WRITE else 0, view, checksum=True))
    for _ in range(3):  # no slot was lost
        engine.run(over(engine, link, READ, 0, view))
        assert np.array_equal(view, data)


class Kept:
    """Something whose end can be seen."""


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_deadline_passes_while_a_copy_hangs_and_memory_stays_out_of_use(keeping, op) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    pool = Pool(engine.allocate, 0)
    lease, kept = pool.lease(2 * MIB), Kept()
    held, alive = lease.capacity, weakref.ref(kept)
    view = np.frombuffer(lease, np.uint8)
    view[:] = 0x77
    transfer = over(engine, link, op, 0, view)
    transfer.keep(kept)
    link.pause()
    with pytest.raises(DeviceTimeout, match="deadline"):
        engine.run(transfer, timeout_s=0.2)
    assert transfer.in_flight
    assert not transfer.done
    del transfer, lease, view, kept
    gc.collect()
    # What needs no slot goes on; what needs one waits for its own deadline.
    engine.run(without_a_slot(engine), timeout_s=PATIENCE_S)
    with pytest.raises(DeviceTimeout):
        engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)), timeout_s=0.1)
    assert pool.leased_nbytes == held
    assert alive() is not None
    link.resume()

    def is_gone() -> bool:
        engine.run(without_a_slot(engine))
        return alive() is None

    wait_until(is_gone)
    assert pool.leased_nbytes == 0
    view = np.zeros(3 * MIB, np.uint8)
    engine.run(over(engine, link, READ, 0, view), timeout_s=PATIENCE_S)
    engine.run(over(engine, link, WRITE, 0, view), timeout_s=PATIENCE_S)


def test_after_a_deadline_what_lands_is_not_copied(tmp_path) -> None:
    with blockdev.hung_device(tmp_path, 8 * MIB) as device:
        location = parse_location(f"block://{device.node}")
        engine = open_engine(location, device.node, engine="threads", options=SMALL)
        link = EmulatedLink(FAST)
        engine.run(over(engine, link, WRITE, 0, np.full(MIB, 0x61, np.uint8)))
        source = np.full(MIB, 0x62, np.uint8)
        device.freeze()
        with pytest.raises(DeviceTimeout):
            engine.run(over(engine, link, WRITE, 0, source), timeout_s=0.2)
        device.thaw()
        view = np.zeros(MIB, np.uint8)
        engine.run(over(engine, link, READ, 0, view), timeout_s=PATIENCE_S)
        assert set(view.tolist()) <= {0x61, 0x62}
        engine.close()


def test_a_cancelled_read_copies_no_more_and_ends(keeping) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    link.pause()
    transfer = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
    transfer.submit()
    wait_until(lambda: link.stats()["copies"])
    transfer.cancel()
    link.resume()
    assert transfer.wait() == errno.ECANCELED
    assert transfer.done
    assert 0 < link.stats()["to_device_nbytes"] < 4 * MIB


def test_who_queues_up_behind_a_cancelled_last_one_has_its_turn(keeping) -> None:
    engine, link = keeping.engine, EmulatedLink(FAST)
    data = noise(3 * SEGMENT)
    engine.run(over(engine, None, WRITE, 0, data))
    found = np.zeros_like(data)
    link.pause()
    # As long as its copies hang it has all slots, and the others stay in the queue.
    first = over(engine, link, READ, 0, np.zeros(MIB, np.uint8))
    turns = [
        over(engine, link, READ, at, found[at : at + SEGMENT])
        for at in range(0, len(data), SEGMENT)
    ]
    for transfer in (first, *turns[:2]):
        transfer.submit()
    turns[1].cancel()
    assert turns[1].wait() == errno.ECANCELED
    turns[2].submit()
    link.resume()
    assert [transfer.wait(PATIENCE_S) for transfer in (first, turns[0], turns[2])] == [0, 0, 0]
    assert np.array_equal(found[:SEGMENT], data[:SEGMENT])
    assert not found[SEGMENT : 2 * SEGMENT].any()
    assert np.array_equal(found[2 * SEGMENT :], data[2 * SEGMENT :])
