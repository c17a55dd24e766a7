"""The host's OpenAI-compatible server, with the states of its models in a store."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import spdk_kv
from integrations.llama_cpp.models import CONTEXT, text
from support.waiting import PATIENCE_S, wait_until

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("uvicorn", reason="the server's own requirements are not installed")

PROMPT = text(1, 700)
KEPT = re.compile(r"(\d+) prefix-match hit, remaining (\d+) prompt tokens to eval")


class Server:
    """A server that runs, and what it says."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))

    def is_up(self) -> bool:
        assert self.process.poll() is None, "".join(self.said)
        try:
            with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S):
                return True
        except ConnectionRefusedError:
            return False

    def ask(self, prompt: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """The answer to ``prompt``, and for each time that the context had a beginning of it: how
        many tokens, and how many were left to compute."""
        already = len(self.said)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        body: dict[str, Any] = {"prompt": self.text_of(prompt), "max_tokens": 8, "temperature": 0}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        connection.close()
        said = "".join(self.said[already:])
        return found["choices"][0]["text"], [
            (int(kept), int(left)) for kept, left in KEPT.findall(said)
        ]

    @staticmethod
    def text_of(prompt: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in prompt)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(PATIENCE_S) == 0, "".join(self.said)
        self._reader.join()


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-u", "-m", "spdk_kv.integrations.llama_cpp.serve"),
        *("--kv_store", f"file://{folder}", *options),
        *("--model", str(model), "--n_ctx", str(CONTEXT), "--port", str(port)),
        *("--n_threads", "1", "--seed", "1", "--verbose", "true"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        server = Server(process, port)
        try:
            wait_until(server.is_up, "the server does not start")
            yield server
            server.stop()
        finally:
            process.kill()


def test_a_server_finds_the_prompts_of_the_one_before(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with serving(model_path, folder, "--kv_capacity", "64 MiB") as server:
        first, kept = server.ask(PROMPT)
        assert not kept
    with serving(model_path, folder) as server:
        second, kept = server.ask(PROMPT)
    assert second == first
    [(tokens, left)] = kept
    assert tokens >= len(PROMPT) - 1
    assert left == 1


def test_a_server_may_only_read(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    spdk_kv.open(f"file://{folder}", capacity="64 MiB").close()
    with (
        spdk_kv.open(f"file://{folder}") as store,
        serving(model_path, folder, "--kv_read_only", "--kv_capacity", "64 MiB") as server,
    ):
        assert server.ask(PROMPT)[0]
        assert len(store) == 0


def test_its_help_has_both_kinds_of_arguments() -> None:
    command = [sys.executable, "-m", "spdk_kv.integrations.llama_cpp.serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "--kv_store" in done.stdout
    assert "--n_ctx" in done.stdout
