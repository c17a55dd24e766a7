"""A whole engine: the same tokens with a tier and without, over restarts and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integrations.vllm.host import tier_at

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integrations/vllm)")

PROGRAM = Path(__file__).with_name("engine.py")
# Two of 12 whole blocks of 32 tokens, and some.
PROMPTS = np.random.default_rng(1).integers(3, 500, (2, 400)).tolist()
BLOCKS = 24


class Engine:
    """The program, as long as it runs."""

    def __init__(self, model: Path, tier: dict[str, Any] | None, errors: Path) -> None:
        self._errors = errors
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "run", str(model), json.dumps(tier)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
        )

    def ask(self, prompts: list[list[int]]) -> dict[str, Any]:
        """What it says to ``prompts``. The test's timeout is for one that says nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self._errors.read_text()[-5000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> int:
        """Ends it as a user does; its exit status."""
        self.process.communicate()
        return self.process.returncode


@contextmanager
def engine(tmp_path: Path, tier: dict[str, Any] | None) -> Iterator[Engine]:
    running = Engine(tmp_path / "model", tier, tmp_path / "errors")
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


@pytest.mark.timeout(1800)
def test_a_fresh_engine_goes_on_with_what_a_killed_one_stored(tmp_path):
    subprocess.run([sys.executable, str(PROGRAM), "make", str(tmp_path / "model")], check=True)
    with engine(tmp_path, None) as plain:
        wanted = plain.ask(PROMPTS)
        assert plain.stop() == 0
    tier = tier_at(tmp_path / "store")
    with engine(tmp_path, tier) as first:
        answer = first.ask(PROMPTS)
        assert answer["tokens"] == wanted["tokens"]
        assert answer["cached"] == [0, 0]
        assert answer["stats"]["blobs"] == BLOCKS
        first.process.send_signal(signal.SIGKILL)
        assert first.stop() == -signal.SIGKILL
    with engine(tmp_path, tier) as second:
        answer = second.ask(PROMPTS)
        assert answer["tokens"] == wanted["tokens"]
        assert answer["cached"] == [384, 384], "what the first one stored"
        assert answer["stats"] == {"blobs": BLOCKS, "hits": BLOCKS, "corruptions": 0}
        assert second.stop() == 0
    # Other weights under the same name, and the same text.
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\0\0")
    with engine(tmp_path, tier) as other:
        answer = other.ask(PROMPTS)
        assert answer["cached"] == [0, 0]
        assert answer["stats"]["blobs"] == 2 * BLOCKS
