"""A chat that reads a part survives kill -9 in any of its stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("killing.py")


def test_killed_in_every_stage(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("killed 5 times\n"), done.stdout + done.stderr
