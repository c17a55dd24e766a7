"""What SPDK does to the process that it is set up in: nothing that anyone would notice.

Every test has a process of its own, since the environment is set up once per process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engines.spdk.target import Target, hugepages, target_fixture
from support.places import TESTS
from support.subprocesses import run_script
from support.waiting import PATIENCE_S, wait_until

MIB = 1 << 20
target = target_fixture

_PREAMBLE = """
import os, signal, sys
from spdk_kv.testing import SMALL, read, write
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.engines.spdk import environment
from spdk_kv.engines.spdk.environment import SpdkSettings
LEAN = SpdkSettings(hugepages=False, memory_nbytes=64 << 20)
def opened(uri, settings=LEAN):
    environment.configure(settings)
    return open_engine(parse_location(uri), options=SMALL)
"""


@pytest.fixture(scope="module")
def uri(target: Target) -> str:
    nsid = target.add_namespace(8 * MIB, 4096)
    target.listen()
    return target.uri("vfiouser", nsid)


def script(code: str, uri: str) -> str:
    return run_script(code, preamble=f"{_PREAMBLE}\nuri = {uri!r}\n")


def test_the_process_keeps_its_cores(uri):
    script(
        """
        import contextlib, threading
        everywhere = os.sched_getaffinity(0)
        engine = opened(uri)
        write(engine, 0, b"x" * 100_000)
        assert os.sched_getaffinity(0) == everywhere
        seen = []
        later = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        later.start()
        later.join()
        assert seen == [everywhere]
        pinned = set()
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # just ended
                if os.sched_getaffinity(int(thread)) != everywhere:
                    pinned.add(open(f"/proc/self/task/{thread}/comm").read())
        # DPDK's own thread for interrupts, which sleeps.
        assert pinned <= {"dpdk-intr\\n"}, pinned
        engine.close()
        assert os.sched_getaffinity(0) == everywhere
        """,
        uri,
    )


_TRUNCATED = """
import mmap
with open(path, "wb") as file:
    file.truncate(1 << 20)
with open(path, "r+b") as file:
    view = mmap.mmap(file.fileno(), 1 << 20)
os.truncate(path, 0)
"""


def faulting(tmp_path: Path, uri: str, before: str) -> subprocess.CompletedProcess[str]:
    tests = str(TESTS)
    head = f"import sys; sys.path[:0] = [{tests!r}]\n"
    head += f"path, uri = {str(tmp_path / 'mapped')!r}, {uri!r}\n"
    code = f"{head}{_PREAMBLE}\n{before}\nengine = opened(uri)\n{_TRUNCATED}\nview[0]\n"
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_foreign_sigbus_still_kills(tmp_path, uri):
    ended = faulting(tmp_path, uri, "")
    assert ended.returncode == -signal.SIGBUS, ended.stderr


def test_a_foreign_sigbus_reaches_the_handler_from_before(tmp_path, uri):
    ended = faulting(tmp_path, uri, "import faulthandler; faulthandler.enable()")
    assert ended.returncode == -signal.SIGBUS, ended.stderr
    assert "Fatal Python error: Bus error" in ended.stderr


def test_a_forked_child_is_refused_and_harms_nobody(uri):
    script(
        """
        from spdk_kv.errors import ClosedError
        engine = opened(uri)
        write(engine, 0, b"parent")
        pid = os.fork()
        if not pid:
            refused = 0
            for attempt in (lambda: read(engine, 0, 6), lambda: opened(uri)):
                try:
                    attempt()
                except ClosedError:
                    refused += 1
            engine.close()
            del engine
            os._exit(0 if refused == 2 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert read(engine, 0, 6) == b"parent"
        write(engine, 0, b"after")
        assert read(engine, 0, 5) == b"after"
        engine.close()
        """,
        uri,
    )


def test_log_lines_go_through_logging_and_nothing_is_printed(uri):
    printed = script(
        """
        import logging, time
        lines = []
        class Collect(logging.Handler):
            def emit(self, record):
                lines.append((record.name, record.levelno, record.getMessage()))
        root = logging.getLogger()
        root.addHandler(Collect())
        root.setLevel(logging.DEBUG)
        engine = opened(uri)
        write(engine, 0, b"x")
        engine._controller.reset()
        engine.close()
        try:
            opened("spdk+tcp://127.0.0.1:1/nqn.none/1")
        except Exception:
            pass
        else:
            raise SystemExit("it should have failed")
        until = time.monotonic() + 5
        wanted = [logging.INFO, logging.ERROR]
        while time.monotonic() < until:
            levels = {level for name, level, _ in lines if name == "spdk_kv.spdk"}
            if set(wanted) <= levels:
                break
            time.sleep(0.01)
        assert set(wanted) <= levels, lines
        assert any("EAL" in text for name, _, text in lines if name == "spdk_kv.spdk"), lines
        """,
        uri,
    )
    assert printed == ""


@pytest.mark.machine
def test_no_sockets_and_no_files_are_left_by_a_killed_process(uri):
    def leftovers() -> set[str]:
        found = {str(path) for path in Path("/dev/hugepages").glob("*")}
        return found | {str(path) for path in Path("/var/run/dpdk").glob("**/*")}

    before = leftovers()
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    with hugepages(256 * MIB):
        free_before = int(free.read_text())
        script(
            """
            pid = os.fork()
            if not pid:
                engine = opened(uri, SpdkSettings(hugepages=True))
                write(engine, 0, b"secret" * 1000)
                assert read(engine, 0, 6) == b"secret"
                os.kill(os.getpid(), signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            """,
            uri,
        )
        assert leftovers() <= before
        # Other programs take and give some as well.
        wait_until(lambda: int(free.read_text()) >= free_before - 16, "pages are not given back")


def test_a_process_opens_no_socket_for_telemetry(uri):
    script(
        """
        engine = opened(uri)
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.lexists(f"/proc/self/fd/{fd}")]
        listening = {line.split()[6] for line in open("/proc/self/net/unix")
                     if line.split()[3] == "00010000"}
        own = {name[8:-1] for name in names if name.startswith("socket:")}
        assert not own & listening
        assert not any("dpdk" in name for name in names), names
        engine.close()
        """,
        uri,
    )


@pytest.mark.machine
def test_without_hugepages_it_goes_on_or_says_what_to_do(uri):
    # So that there are some to take.
    with hugepages(160 * MIB):
        _without_hugepages(uri)


def _without_hugepages(uri):
    script(
        """
        from engines.spdk.target import hugepages_taken
        from spdk_kv.errors import EngineUnavailable
        with hugepages_taken():
            engine = opened(uri, SpdkSettings(memory_nbytes=64 << 20))
        write(engine, 0, b"x" * 100_000)
        assert read(engine, 0, 100_000) == b"x" * 100_000
        try:
            environment.configure(SpdkSettings(hugepages=True))
        except EngineUnavailable as refused:
            assert "before the first use" in str(refused)
        else:
            raise SystemExit("settings changed after the fact")
        engine.close()
        """,
        uri,
    )
    script(
        """
        from engines.spdk.target import hugepages_taken
        from spdk_kv.errors import EngineUnavailable
        with hugepages_taken():
            try:
                opened(uri, SpdkSettings(hugepages=True))
            except EngineUnavailable as refused:
                assert "hugepages" in str(refused) and "doctor" in str(refused), refused
            else:
                raise SystemExit("hugepages were wanted, and there were none")
        """,
        uri,
    )


def test_too_little_memory_is_an_error_with_the_remedy(uri):
    script(
        """
        from spdk_kv.engines import QueueOptions
        from spdk_kv.errors import EngineUnavailable
        environment.configure(LEAN)
        try:
            open_engine(parse_location(uri), options=QueueOptions(64, 4 << 20))
        except EngineUnavailable as refused:
            assert "hugepages" in str(refused), refused
        else:
            raise SystemExit("512 MiB of slots out of 64")
        engine = opened(uri)
        write(engine, 0, b"x")
        engine.close()
        """,
        uri,
    )
