"""Drives that another process has, and targets that stop answering: whoever waits gets an error
by a deadline, and others do not wait."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.spdk.drives import NQN
from engines.spdk.target import Target, target_fixture, wait_until_back
from spdk_kv._native.transfer import READ
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.engines.spdk import environment
from spdk_kv.engines.spdk.controllers import transport_id
from spdk_kv.engines.spdk.engine import SpdkEngine
from spdk_kv.engines.spdk.refusal import refusal
from spdk_kv.errors import DeviceError, DeviceGone, DeviceTimeout, EngineUnavailable, SpdkKvError
from spdk_kv.testing import SMALL, address_of, memory, read, write
from support.subprocesses import run_script

MIB = 1 << 20
TRANSPORTS = ("vfiouser", "tcp")
# Longer than any of it takes on a busy machine; what waited without end fails.
SOON_S = 60.0
target = target_fixture


@pytest.fixture(scope="module", autouse=True)
def namespaces(target: Target) -> None:
    target.add_namespace(96 * MIB, 4096)
    target.listen()


@pytest.fixture
def occupied(tmp_path: Path) -> Iterator[str]:
    """A vfio-user target that serves somebody else: connections wait."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "cntrl"))
        listening.listen(1)
        yield f"spdk+vfiouser://{tmp_path}/{NQN}/1"


def opened(uri: str, options: QueueOptions = SMALL) -> SpdkEngine:
    engine = open_engine(parse_location(uri), options=options)
    assert isinstance(engine, SpdkEngine)
    return engine


class Aside:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as failed:
            self.error = failed

    def end(self) -> BaseException | None:
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), "it waits without end"
        return self.error


def stopped(target: Target) -> None:
    target.process.send_signal(signal.SIGSTOP)


def continued(target: Target) -> None:
    target.process.send_signal(signal.SIGCONT)


def test_opening_what_another_process_has_ends_and_holds_nobody_up(target, occupied):
    engine = opened(target.uri("vfiouser"))
    openings = [Aside(lambda: opened(occupied)) for _ in range(3)]
    write(engine, 0, b"x" * MIB)
    assert read(engine, 0, MIB) == b"x" * MIB
    assert engine.allocate(MIB).nbytes == MIB
    opened(target.uri("tcp")).close()
    errors = [opening.end() for opening in openings]
    assert [type(error) for error in errors] == [DeviceTimeout] * 3, errors
    assert "another one has it, or it hangs" in str(errors[0])
    engine.close()


def test_opening_a_tcp_target_that_answers_nothing_ends(target):
    opened(target.uri("tcp")).close()  # SPDK is set up
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = parse_location(f"spdk+tcp://127.0.0.1:{mute.getsockname()[1]}/{NQN}/1")

        def connect() -> None:
            environment.bindings().Controller(transport_id(place), connect_timeout_s=0.5)

        failed = Aside(connect).end()
        assert isinstance(failed, OSError)
        assert failed.errno == errno.ETIMEDOUT
        why = refusal(place, failed, 0)
        assert isinstance(why, DeviceTimeout)
        assert "does not answer" in str(why)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_target_that_stops_answering(target, transport):
    engine = opened(target.uri(transport))
    write(engine, 0, b"kept")
    stopped(target)
    try:
        reading = Aside(lambda: engine.run(reads(engine), 0.2))
        assert isinstance(reading.end(), DeviceTimeout)
        # Memory comes and goes without the target, and others' calls end.
        lease = engine.allocate(MIB)
        del lease
        health = Aside(engine.health)
        failed = health.end()
        assert isinstance(failed, DeviceError), failed
        with pytest.raises(SpdkKvError):
            engine.run(reads(engine), 0.2)
    finally:
        continued(target)
    wait_until_back(lambda: within(engine))
    assert read(engine, 0, 4) == b"kept"
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_is_closed_while_its_target_is_silent(target, transport):
    engine = opened(target.uri(transport))
    write(engine, 0, b"x")
    stopped(target)
    try:
        assert Aside(engine.close).end() is None
    finally:
        continued(target)
    again = opened(target.uri(transport))
    assert read(again, 0, 1) == b"x"
    again.close()


def reads(engine: SpdkEngine) -> Any:
    into = memory(4096)
    transfer = engine.transfer(READ)
    transfer.keep(into)
    transfer.add(0, address_of(into), 4096)
    return transfer


def within(engine: SpdkEngine) -> None:
    """A read; a deadline that passes is as good as a drive that is away."""
    try:
        engine.run(reads(engine), 1.0)
    except DeviceTimeout as late:
        raise DeviceGone(str(late)) from late


def test_segments_of_hundreds_of_commands_are_split(target):
    # In a process of its own, for the memory. Two of them need more requests than SPDK has for a
    # queue pair by default.
    run_script(
        f"""
        from engines.spdk.drives import SETTINGS
        from spdk_kv.engines import QueueOptions, open_engine, parse_location
        from spdk_kv.engines.spdk import environment
        from spdk_kv.testing import read, write
        environment.configure(SETTINGS)
        segment_nbytes, nbytes = 40 << 20, 80 << 20
        options = QueueOptions(depth=2, segment_nbytes=segment_nbytes)
        engine = open_engine(parse_location({target.uri("vfiouser")!r}), options=options)
        assert engine.namespace["max_transfer_nbytes"] == 128 << 10
        write(engine, 0, b"begin" + bytes(nbytes - 8) + b"end")
        data = read(engine, 0, nbytes)
        assert (data[:5], data[-3:]) == (b"begin", b"end")
        engine.close()
        """
    )


def test_what_is_wrong_with_a_socket_is_said(tmp_path):
    uri = f"spdk+vfiouser://{tmp_path}/{NQN}/1"
    with pytest.raises(DeviceGone, match=f"no folder {tmp_path}/none"):
        opened(f"spdk+vfiouser://{tmp_path}/none/{NQN}/1")
    with pytest.raises(DeviceGone, match=f"no socket {tmp_path}/cntrl"):
        opened(uri)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "cntrl"))
    with pytest.raises(DeviceGone, match="the target ended"):
        opened(uri)
    denied = refusal(parse_location(uri), OSError(errno.EACCES, os.strerror(errno.EACCES)), 0)
    assert isinstance(denied, EngineUnavailable)
    assert "may not connect" in str(denied)


def test_what_is_wrong_with_a_portal_is_said(target):
    with pytest.raises(DeviceGone, match=r"no NVMe/TCP target listens at 127\.0\.0\.1 port 1"):
        opened(f"spdk+tcp://127.0.0.1:1/{NQN}/1")
    with pytest.raises(DeviceGone, match=f"has no subsystem {NQN}.none for this host"):
        opened(f"spdk+tcp://127.0.0.1:{target.port}/{NQN}.none/1")


def test_another_subsystem_at_the_socket_is_refused(target):
    uri = target.uri("vfiouser").replace(NQN, f"{NQN}.other")
    with pytest.raises(DeviceGone, match=f"is {NQN}, not {NQN}.other"):
        opened(uri)
    engine = opened(target.uri("vfiouser"))
    assert engine.controller["nqn"] == NQN
    engine.close()
