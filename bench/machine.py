"""Which machine a figure was measured on, in lines to be pasted beside it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import fast_drive
import fio


def describe(folder: Path | None, yardstick: str = "") -> list[str]:
    """Lines ``what: it is``; ``folder`` lies on the drive that is measured (None: no line about
    it). ``yardstick``: what it is compared with, if not fio."""
    import torch

    import spdk_kv

    try:
        yardstick = yardstick or fio.version()
    except RuntimeError as missing:
        yardstick = str(missing)
    lines = [
        f"CPU: {_cpu()}, {os.cpu_count()} logical cores, {_memory()} of memory",
        f"kernel: {platform.release()}; load before: {os.getloadavg()[0]:.2f}",
        f"software: {yardstick}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"spdk_kv {spdk_kv.__version__} (commit {commit()})",
    ]
    return lines if folder is None else [*lines, f"drive: {drive(folder)}"]


def drive(folder: Path) -> str:
    """The filesystem and the drive under ``folder``, and whether that is simulated."""
    mount = _json("findmnt", "--json", "-o", "SOURCE,FSTYPE,OPTIONS", "-T", str(folder))
    if not mount:
        return f"unknown, under {folder}"
    found = mount["filesystems"][0]
    name = os.path.basename(found["source"])
    parts = [f"{found['fstype']} on {found['source']}"]
    for title, path in (
        ("model", "device/model"),
        ("read-ahead KiB", "queue/read_ahead_kb"),
        ("scheduler", "queue/scheduler"),
    ):
        for node in (f"/sys/class/block/{name}", f"/sys/class/block/{name}/.."):
            try:
                text = Path(node, path).read_text().strip()
            except OSError:
                continue
            parts.append(f"{title} {text}")
            break
    if name.startswith("loop"):
        parts.insert(0, fast_drive.LABEL)
    return ", ".join(parts)


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where files were changed since; "unknown"."""
    if shutil.which("git") is None:
        return "unknown"
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def label(folder: Path) -> str:
    """What a record calls the drive under ``folder``: "disk", or what simulates one."""
    return fast_drive.LABEL if drive(folder).startswith(fast_drive.LABEL) else "disk"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> str:
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{nbytes / (1 << 30):.1f} GiB"


def _json(*words: str) -> dict[str, list[dict[str, str]]]:
    if shutil.which(words[0]) is None:
        return {}
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout) if done.stdout else {}
    return found
