"""Runs a piece of Python in a process of its own, for what would not survive in the test's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator

import pytest

from support.places import TESTS
from support.waiting import PROCESS_PATIENCE_S

# Not the checkout: where spdk_kv is installed, the package there is without what was compiled.
_PREAMBLE = f"import sys; sys.path[:0] = [{str(TESTS)!r}]\n"


@pytest.fixture
def interruptible_fixture() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here, and ends what is started here, also where the tests'
    shell has it ignored, as it has for what runs in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_script(script: str, *, preamble: str = "", timeout_s: float = PROCESS_PATIENCE_S) -> str:
    """What ``script`` printed. Fails when it ends with a status, prints to stderr, or hangs."""
    source = _PREAMBLE + preamble + textwrap.dedent(script)
    command = [sys.executable, "-X", "faulthandler", "-c", source]
    # Files rather than pipes, and a session of its own: children that it leaves behind can
    # neither hold a pipe open nor outlive the test.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            status: object = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = f"none: it still ran after {timeout_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        printed, complaints = out.read(), err.read()
    assert status == 0, f"status {status}\n{printed}\n{complaints}"
    assert complaints == "", complaints
    return printed
