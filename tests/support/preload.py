"""Libraries that stand before the C library's functions (LD_PRELOAD), for faults that cannot be had
otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def preloaded(source: str, folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that has C ``source`` before its C library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    library = folder / "preloaded.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=source.encode(), check=True)
    return os.environ | variables | {"LD_PRELOAD": str(library)}
