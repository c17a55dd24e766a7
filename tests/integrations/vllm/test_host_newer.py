"""The same with the next contract: vLLM 0.33, of which install.sh keeps what runs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.waiting import PROCESS_PATIENCE_S

NEWER = Path(sys.prefix, "vllm-0.33")
HERE = Path(__file__).parent


@pytest.mark.skipif(not NEWER.exists(), reason=f"no vLLM 0.33 in {NEWER.name} (install.sh)")
@pytest.mark.parametrize("name", ["test_contract.py", "test_host_jobs.py", "test_host_trouble.py"])
def test_with_the_next_contract(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(NEWER)},
        timeout=PROCESS_PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
