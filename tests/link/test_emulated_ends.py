"""What ends amid transfers over the emulated link: their owner, the engine, the process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from link.transfers import FAST, MIB, SEGMENT, over, without_a_slot
from spdk_kv._native.link.emulated import EmulatedLink
from spdk_kv._native.memory import Pool
from spdk_kv._native.transfer import READ
from spdk_kv.errors import ClosedError
from spdk_kv.testing import Medium
from support.media import medium
from support.subprocesses import run_script


@pytest.fixture
def ram(tmp_path) -> Iterator[Medium]:
    with medium("ram", tmp_path) as found:
        yield found


def test_dropped_transfers_land_and_their_memory_goes_after_that(ram) -> None:
    engine, link = ram.engine, EmulatedLink(FAST)
    ram.poke(0, b"\xff" * SEGMENT)
    pool = Pool(engine.allocate, 1 << 20)
    guards = [pool.lease(SEGMENT) for _ in range(20)]
    for guard in guards:
        np.frombuffer(guard, np.uint8)[:] = 0
    del guards[1::2]
    for round_ in range(400):
        lease = pool.lease(SEGMENT)
        transfer = over(engine, link, READ, 0, np.frombuffer(lease, np.uint8))
        transfer.submit(priority=round_ % 2)
        del transfer, lease
        fresh = pool.lease(SEGMENT)
        view = np.frombuffer(fresh, np.uint8)
        view[::512] = 7
        if round_ % 20 == 0:
            engine.run(over(engine, link, READ, 0, np.zeros(SEGMENT, np.uint8)))
            assert set(view[::512].tolist()) == {7}, "a copy landed in another's lease"
        del view, fresh
    gone = weakref.ref(link)
    del link
    engine.run(without_a_slot(engine))
    assert all(not np.frombuffer(guard, np.uint8).any() for guard in guards[:-1])
    engine.close()
    del engine, ram.engine, guard, guards
    gc.collect()
    assert gone() is None, "the link outlives what used it"


def test_closing_waits_for_copies_and_says_when_one_hangs(tmp_path) -> None:
    with medium("ram", tmp_path) as found:
        engine, link = found.engine, EmulatedLink(200e6)
        transfer = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
        transfer.submit()
        engine.close()
        assert transfer.done
        assert transfer.status == 0
        with pytest.raises(ClosedError):
            engine.transfer(READ, link=link)


def test_closing_while_a_copy_hangs_lets_everybody_go() -> None:
    printed = run_script("""
        import gc, threading, time
        import numpy as np
        from link.transfers import *
        from spdk_kv._native.link.emulated import EmulatedLink
        from spdk_kv._native.transfer import READ, WRITE
        from spdk_kv.engines import open_engine, parse_location
        from spdk_kv.errors import ClosedError, DeviceTimeout
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=MIB,
                             options=SMALL)
        link = EmulatedLink(FAST)
        link.pause()
        outcomes = []
        def wait():
            try:
                engine.run(over(engine, link, READ, 0, np.zeros(MIB, np.uint8)))
            except DeviceTimeout:
                outcomes.append("timeout")
        thread = threading.Thread(target=wait)
        thread.start()
        while not engine.queue.active:
            time.sleep(0.001)
        try:
            engine.close(timeout_s=0.3)
        except DeviceTimeout as failure:
            print(failure)
        thread.join(100)
        print(outcomes)
    """)
    assert printed.splitlines() == ["ram:// still holds memory 0.3 s after close", "['timeout']"]


EXITS = """
    import os, sys, threading
    import numpy as np
    from link.transfers import *
    from spdk_kv._native.link.emulated import EmulatedLink
    from spdk_kv._native.transfer import READ, WRITE
    from spdk_kv.engines import open_engine, parse_location
    engine = open_engine(parse_location("{name}://"), engine="{name}", capacity_nbytes=8 * MIB,
                         options=SMALL)
    link = EmulatedLink(200e6)
    made = [over(engine, link, op, 0, np.zeros(4 * MIB, np.uint8)) for op in (READ, WRITE)]
    for transfer in made:
        transfer.submit()
    thread = threading.Thread(target=made[0].wait, daemon=True)
    thread.start()
    {how}
"""


@pytest.mark.parametrize("how", ["pass", "del made", "sys.exit(0)", "link.pause()"])
@pytest.mark.parametrize("name", ["ram", "null"])
def test_the_interpreter_may_exit_in_mid_copy(how, name) -> None:
    assert run_script(EXITS.format(how=how, name=name)) == ""


def test_a_forked_child_is_refused() -> None:
    run_script("""
        import os
        import numpy as np
        from link.transfers import *
        from spdk_kv._native.link.emulated import EmulatedLink
        from spdk_kv._native.transfer import READ, WRITE
        from spdk_kv.engines import open_engine, parse_location
        from spdk_kv.errors import ClosedError, DeviceTimeout
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=8 * MIB,
                             options=SMALL)
        link = EmulatedLink(500e6)
        flying = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
        flying.submit()
        child = os.fork()
        if child == 0:
            try:
                engine.transfer(READ, link=link)
            except ClosedError:
                del flying, engine, link
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert flying.wait() == 0
    """)


def test_ctrl_c_comes_out_of_a_wait_for_a_copy() -> None:
    printed = run_script("""
        import signal, threading, time
        import numpy as np
        from link.transfers import *
        from spdk_kv._native.link.emulated import EmulatedLink
        from spdk_kv._native.transfer import READ, WRITE
        from spdk_kv.engines import open_engine, parse_location
        from spdk_kv.errors import ClosedError, DeviceTimeout
        interrupts = []
        def interrupt(number, frame):
            interrupts.append(1)
            if len(interrupts) == 2:  # which ends the wait for what the first cancelled
                signal.signal(number, signal.SIG_IGN)
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        engine = open_engine(parse_location("ram://"), engine="ram", capacity_nbytes=8 * MIB,
                             options=SMALL)
        link = EmulatedLink(FAST)
        link.pause()
        transfer = over(engine, link, READ, 0, np.zeros(4 * MIB, np.uint8))
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        try:
            engine.run(transfer)
        except KeyboardInterrupt:
            print("interrupted", transfer.in_flight)
        link.resume()
        while transfer.in_flight:
            time.sleep(0.001)
        engine.close()
        print("closed")
    """)
    assert printed.split() == ["interrupted", "True", "closed"]
