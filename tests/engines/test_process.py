"""Forks, signals, exits, forbidden system calls: what happens to a process around an engine.

Each runs in a process of its own.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import pytest

from support.media import image
from support.rounds import rounds
from support.subprocesses import run_script

PREAMBLE = """
import errno, faulthandler, gc, os, random, signal, sys, threading, time
import numpy as np
from spdk_kv.testing import SMALL, address_of, memory, read, write
from spdk_kv._native.memory import Pool
from spdk_kv._native.transfer import FLUSH, PREFETCH, READ, WRITE
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.errors import ClosedError

MIB = 1 << 20
faulthandler.dump_traceback_later(440, exit=True)

def opened(name, path, options=SMALL):
    location = f"{name}://" if name in ("ram", "null") else f"file://{path}"
    return open_engine(parse_location(location), path, engine=name, capacity_nbytes=8 * MIB,
                       options=options)

def reading(engine, nbytes, pieces=1, op=READ, checksum=False, shift=0):
    into = memory(nbytes, shift)
    transfer = engine.transfer(op, checksum=checksum)
    transfer.keep(into)
    for _ in range(pieces):
        transfer.add(0, address_of(into), nbytes)
    return transfer
"""

ENGINES = ["uring", "threads", "pagecache", "ram"]


def script(body: str, engine: str, folder, **options) -> str:
    return run_script(
        f"path = {str(image(folder))!r}\nname = {engine!r}\n{body}", preamble=PREAMBLE, **options
    )


FORK = """
# Its watchdog is a thread, which a child would wait for in vain.
faulthandler.cancel_dump_traceback_later()
signal.alarm(440)
engine = opened(name, path)
write(engine, 0, b"\\x61" * MIB)
pool = Pool(engine.allocate, MIB)
leases = [pool.lease(300_000) for _ in range(8)]
reaped = engine.start(reading(engine, MIB), lambda t: t.status)
busy = threading.Event()
def work():
    while not busy.is_set():
        engine.run(reading(engine, MIB, 3))
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for round in range(10):
    flying = reading(engine, MIB, 20)
    flying.submit()
    built = reading(engine, MIB)
    child = os.fork()
    if child == 0:
        signal.alarm(400)
        # Only what was over before the fork can still be asked how it went.
        refused = int(flying.done)
        for use in (lambda: engine.transfer(READ), engine.flush, engine.stats, built.run,
                    flying.wait, flying.cancel, lambda: engine.start(built, id),
                    lambda: engine.discard(0, 4096)):
            try:
                use()
            except ClosedError:
                refused += 1
        engine.allocate(4096)
        engine.close()
        del flying, built, leases, pool, use
        gc.collect()
        if refused != 8:
            os._exit(100 + refused)
        sys.exit(0) if round % 2 else os._exit(0)
    assert flying.wait() == 0
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    # The child gave its leases back: the parent's must still be known to the ring.
    transfer = engine.transfer(READ)
    for lease in leases:
        transfer.add(0, lease.address, 300_000)
    engine.run(transfer)
    assert all(bytes(memoryview(lease)) == b"\\x61" * 300_000 for lease in leases)
busy.set()
for thread in threads:
    thread.join()
assert reaped.result(60) == 0
assert read(engine, 0, MIB) == b"\\x61" * MIB
engine.close()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_is_refused_and_leaves_its_parent_alone(engine, tmp_path):
    script(FORK, engine, tmp_path)


INTERRUPT = """
signal.signal(signal.SIGINT, signal.default_int_handler)
engine = opened(name, path)
write(engine, 0, b"\\x62" * MIB)
rng = random.Random(1)
cut_short = round = 0
# An interrupt may come just as a transfer ends by itself: on a busy machine often, not always.
while round < rounds or not cut_short and round < 50 * rounds:
    round += 1
    def shoot(delay):
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)
    shooter = threading.Thread(target=shoot, args=(rng.random() * 0.02,))
    # Summed and copied, so that the loop always has something at hand; or read as it is.
    long = reading(engine, MIB, 3000, checksum=round % 2, shift=round % 2)
    try:
        shooter.start()
        while True:
            engine.run(long)
            long = reading(engine, MIB, 3000, checksum=round % 2, shift=round % 2)
    except KeyboardInterrupt:
        cut_short += long.status == errno.ECANCELED
    shooter.join()
    assert not long.in_flight
    del long
    if round % 5 == 0:
        assert read(engine, 0, MIB) == b"\\x62" * MIB
assert cut_short, "interrupts wait for the rest of a transfer's thousands of commands"
assert engine.queue.active == 0
engine.close()
"""


@pytest.mark.parametrize("engine", ["uring", "threads", "ram"])
def test_ctrl_c_drains_and_the_engine_goes_on(engine, tmp_path):
    script(f"rounds = {rounds(15, 50)}\n" + INTERRUPT, engine, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_many_more_times(engine, tmp_path):
    script(
        "faulthandler.cancel_dump_traceback_later()\nrounds = 1500\n" + INTERRUPT,
        engine,
        tmp_path,
        timeout_s=590,
    )


EXIT = """
engines = [opened(name, path) for _ in range(3)]
pool = Pool(engines[0].allocate, MIB)
lease = pool.lease(MIB)
flying = []
for engine in engines:
    for round in range(5):
        flying.append(reading(engine, MIB, 200, op=WRITE if round % 2 else READ, shift=round % 2))
        flying[-1].keep(lease)
        flying[-1].submit(priority=round % 2)
future = engines[1].start(reading(engines[1], MIB, 300), lambda t: t.status)
def work():
    engines[2].run(reading(engines[2], MIB, 3000))
threading.Thread(target=work, daemon=True).start()
class Cycle: pass
cycle = Cycle(); cycle.self = cycle; cycle.everything = (engines, flying, lease)
if how == "drop":
    del engines, engine, flying, pool, lease, cycle
time.sleep(0.01 * (how == "later"))
"""


@pytest.mark.parametrize(
    ("engine", "how"),
    [(engine, how) for engine in ("uring", "threads") for how in ("keep", "drop", "later")]
    + [("pagecache", "drop"), ("ram", "keep"), ("null", "drop")],
)
def test_the_interpreter_ends_with_transfers_in_flight(engine, how, tmp_path):
    script(f"how = {how!r}\n{EXIT}", engine, tmp_path)


THREADS_END = """
engine = opened(name, path, QueueOptions(depth=16, segment_nbytes=64 << 10, hugepages=False))
data = np.random.default_rng(0).bytes(4 * MIB)
write(engine, 0, data)
for round in range(60):
    left = []
    def work():
        into = memory(4 * MIB, round % 2)
        transfer = engine.transfer(READ, checksum=True)
        transfer.keep(into)
        transfer.add(0, address_of(into), 4 * MIB)
        transfer.submit(priority=PREFETCH)
        flushes = engine.transfer(FLUSH)
        for _ in range(40):
            flushes.add(0, 0, 0)
        flushes.submit(priority=PREFETCH)
        # This thread drives for it, and so sends a part of the others to the kernel in its own
        # name; some kernels cancel that part when the thread ends.
        engine.run(reading(engine, 4096))
        left.append((transfer, flushes, into))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for transfer, flushes, into in left:
        engine.wait(transfer)
        engine.wait(flushes)
        assert into.tobytes() == data
assert engine.stats()["errors"] == 0
engine.close()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thread_that_ends_leaves_its_transfers_in_good_hands(engine, tmp_path):
    script(THREADS_END, engine, tmp_path)


FORBIDDEN = """
import ctypes, logging, struct
def instruction(code, jump_true, jump_false, value):
    return struct.pack("HBBI", code, jump_true, jump_false, value)
# seccomp(2): load the system call's number; io_uring_setup (425) fails with EPERM.
rules = b"".join([
    instruction(0x20, 0, 0, 0),
    instruction(0x15, 0, 1, 425),
    instruction(0x06, 0, 0, 0x00050001),
    instruction(0x06, 0, 0, 0x7FFF0000),
])
libc = ctypes.CDLL(None, use_errno=True)
held = ctypes.create_string_buffer(rules)
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(held))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
said = []
class Listen(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("spdk_kv").addHandler(Listen())
for _ in range(3):
    engine = open_engine(parse_location(os.path.dirname(path)), path)
    assert engine.name == "threads", engine.name
    write(engine, 0, b"all the same")
    assert read(engine, 0, 12) == b"all the same"
    engine.close()
assert len(said) == 1, said
assert "threads" in said[0] and "io_uring is forbidden here" in said[0], said
from spdk_kv.engines import engine_status
uring = next(status for status in engine_status() if status.name == "uring")
assert not uring.available and "seccomp" in uring.remedy
from spdk_kv.errors import EngineUnavailable
try:
    open_engine(parse_location(os.path.dirname(path)), path, engine="uring")
except EngineUnavailable as refused:
    assert "forbidden" in str(refused)
else:
    raise SystemExit("uring opened")
"""


def test_where_io_uring_is_forbidden_threads_serve_and_it_is_said_once(tmp_path):
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the filter is written for x86_64 and aarch64")
    script(FORBIDDEN, "threads", tmp_path)


MEMLOCK = """
import logging, resource
said = []
class Listen(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("spdk_kv").addHandler(Listen())
logging.getLogger("spdk_kv").setLevel(logging.INFO)
blocks = [np.random.default_rng(shift).integers(0, 256, 4 * MIB, np.uint8) for shift in (0, 1)]
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
os.setgid(65534)
os.setuid(65534)
# More slots than may be locked.
options = QueueOptions(depth=4, segment_nbytes=MIB, hugepages=False)
for _ in range(3):
    engine = open_engine(parse_location("file:///ours"), path, options=options)
    assert engine.name == wanted, (engine.name, said)
    pool = Pool(engine.allocate, 0)
    for shift in (0, 1):
        lease = pool.lease(5 * MIB)
        data = blocks[shift]
        view = np.frombuffer(lease, np.uint8)[shift:shift + 4 * MIB]
        for op in (WRITE, READ):
            view[:] = data if op == WRITE else 0
            transfer = engine.transfer(op)
            transfer.add(0, lease.address + shift, 4 * MIB)
            engine.run(transfer)
        assert np.array_equal(view, data)
        del lease, view
    engine.close()
# Once for each engine that goes without, or once for all that are not rings.
once = 3 if wanted == "uring" else 1
assert len([line for line in said if "RLIMIT_MEMLOCK" in line]) == once, said
"""


@pytest.mark.parametrize(("limit", "wanted"), [(0, "threads"), (256 << 10, "uring")])
def test_without_the_right_to_lock_memory_it_works_all_the_same(limit, wanted):
    """The kernel charges the ring itself, and what is registered with it, to RLIMIT_MEMLOCK."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        data = image(Path(folder))
        data.chmod(0o666)
        body = f"limit = {limit}\nwanted = {wanted!r}\npath = {str(data)!r}\n{MEMLOCK}"
        run_script(body, preamble=PREAMBLE)


NO_RESERVED = """
import ctypes, platform, struct
def instruction(code, jump_true, jump_false, value):
    return struct.pack("HBBI", code, jump_true, jump_false, value)
# seccomp(2): a mapping of reserved hugepages (MAP_HUGETLB) ends the process, as touching one does
# where a cgroup allows none.
number = {"x86_64": 9, "aarch64": 222}[platform.machine()]
rules = b"".join([
    instruction(0x20, 0, 0, 0),
    instruction(0x15, 0, 3, number),
    instruction(0x20, 0, 0, 16 + 8 * 3),  # the fourth argument: flags
    instruction(0x45, 0, 1, 0x40000),
    instruction(0x06, 0, 0, 0x80000000),
    instruction(0x06, 0, 0, 0x7FFF0000),
])
libc = ctypes.CDLL(None, use_errno=True)
held = ctypes.create_string_buffer(rules)
program = struct.pack("HxxxxxxP", 6, ctypes.addressof(held))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
faulthandler.cancel_dump_traceback_later()
signal.alarm(440)
options = QueueOptions(depth=4, segment_nbytes=MIB)
engine = opened(name, path, options)
write(engine, 0, b"\\x63" * (4 * MIB))
pool = Pool(engine.allocate, 64 * MIB)
lease = pool.lease(4 * MIB)
transfer = engine.transfer(READ)
transfer.keep(lease)
transfer.add(0, lease.address, 4 * MIB)
engine.run(transfer)
view = np.frombuffer(lease, np.uint8)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(400)
    os.read(reader, 1)  # until the parent has written
    os._exit(0 if (view == 0x63).all() else 3)
view[:] = 0x64
os.write(writer, b"x")
assert os.waitpid(child, 0)[1] == 0
assert (view == 0x64).all()
del view, lease, transfer
engine.close()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_no_reserved_hugepage_is_taken_and_a_forked_child_sees_the_old_bytes(engine, tmp_path):
    """A reserved hugepage that cannot be had, or that parent and child both need, is SIGBUS."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the filter is written for x86_64 and aarch64")
    script(NO_RESERVED, engine, tmp_path)
