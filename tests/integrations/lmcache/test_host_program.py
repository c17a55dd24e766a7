"""LMCache's program with the configuration of the how-to page: its bench, and its server."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from integrations.lmcache import host
from support.waiting import PATIENCE_S, wait_until

SMALL = ("--num-keys", "8", "--in-flight", "2", "--rounds", "4", "--no-skip-verify")


@pytest.mark.parametrize("words", [("--data-size-kb", "256"), ("--data-size-kb", "3")])
def test_the_bench_verifies_what_it_stored(tmp_path, words):
    ran = host.bench(tmp_path, *SMALL, "--lookup-max-hit-rate", "1", *words)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "All 16 keys data verified OK" in ran.stdout
    # Store, lookup, load: four rounds of sixteen keys.
    assert re.findall(r"Total success: +(\d+)", ran.stdout) == ["64"] * 3


def test_the_bench_says_what_is_wrong_with_an_option(tmp_path):
    ran = host.bench(tmp_path, *SMALL, capcity="1 GiB")
    assert ran.returncode
    assert "no option 'capcity' (did you mean 'capacity'?)" in ran.stdout + ran.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Server:
    """`lmcache server`, as soon as it answers."""

    def __init__(self, log, spec) -> None:
        self.http, self.prometheus = free_port(), free_port()
        words = {
            "--l1-size-gb": "0.1",
            "--eviction-policy": "LRU",
            "--port": free_port(),
            "--http-port": self.http,
            "--prometheus-port": self.prometheus,
            "--l2-adapter": json.dumps(spec),
        }
        command = [host.PROGRAM, "server", *(str(word) for pair in words.items() for word in pair)]
        self._log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=host.ENVIRONMENT
            )

    def get(self, path: str) -> str | None:
        """The answer; None while there is nobody."""
        try:
            with urllib.request.urlopen(f"http://localhost:{self.http}{path}") as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            assert self.process.poll() is None, self.said()
            return None

    def said(self) -> str:
        return self._log.read_text()


@contextmanager
def serving(log, spec):
    server = Server(log, spec)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(PATIENCE_S)


def test_the_server_runs_with_it_and_tells_of_it(tmp_path):
    with serving(tmp_path / "log", host.spec(tmp_path)) as server:
        status = json.loads(wait_until(lambda: server.get("/status")))
        assert status["is_healthy"]
        assert status["storage_manager"]["l2_adapters"] == [{"is_healthy": True, "type": "Client"}]
        metrics = server.get("/metrics")
        assert 'lmcache_mp_l2_usage_bytes{l2_name="native_plugin"}' in metrics

        # A second engine on the same folder ends at once, and says who has it.
        second = Server(tmp_path / "second", host.spec(tmp_path))
        assert second.process.wait(PATIENCE_S)
        assert "StoreLocked" in second.said()
        assert (
            f"PID {server.process.pid}" in second.said() or str(server.process.pid) in second.said()
        )
        # Or it reads beside the first one.
        reader = host.spec(tmp_path, read_only=True, capacity=None)
        with serving(tmp_path / "third", reader) as third:
            assert json.loads(wait_until(lambda: third.get("/status")))["is_healthy"]
    assert server.process.returncode in (0, -15)
