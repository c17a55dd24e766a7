"""The build against an SPDK whose install left out what only its targets need."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

for needed in ("cmake", "ninja", "pkg-config"):
    if shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)


def package(*words: str) -> list[str]:
    found = subprocess.run(["pkg-config", *words], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("pkg-config finds no SPDK")
    return found.stdout.split()


@pytest.mark.parametrize("is_missing", [False, True])
def test_a_missing_libvfio_user_is_said_and_left_out(tmp_path: Path, is_missing: bool) -> None:
    if "-lvfio-user" not in package("--libs", "spdk_syslibs"):
        pytest.skip("SPDK is built without vfio-user")
    (folder,) = package("--variable=libdir", "spdk_nvme") or ["/usr/local/lib"]
    words = ["cmake", "-S", str(ROOT / "cython_src"), "-B", str(tmp_path), "-G", "Ninja"]
    words += ["-DSPDK_KV_SPDK=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if is_missing:
        words.append(f"-DCMAKE_IGNORE_PATH={folder}")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    linked = (tmp_path / "build.ninja").read_text()
    assert ("-lvfio-user" in linked) == (not is_missing)
    assert ("libvfio-user is not installed" in done.stdout) == is_missing
