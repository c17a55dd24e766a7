"""bench/soak.py: a store in daily life, which must show no fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.places import ROOT


@pytest.mark.long
def test_a_soak_finds_nothing(tmp_path):
    command = [sys.executable, ROOT / "bench" / "soak.py", "--minutes", "3", "--dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| faults | 0 |" in done.stdout
    assert "| bytes checked |" in done.stdout
