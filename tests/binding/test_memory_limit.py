"""Memory cgroups for measurements, of both versions of the controller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from binding.groups import group_fixture
from spdk_kv.binding.memory_limit import LimitUnavailable, MemoryGroup, make_group

group = group_fixture
MIB = 1 << 20


@pytest.mark.machine
def test_a_group_limits_and_counts(group: MemoryGroup, tmp_path: Path) -> None:
    group.forbid_swap()
    group.limit(64 * MIB)
    assert group.use().other_nbytes < MIB
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        "held = bytearray(20 << 20); print(open(sys.argv[2]).read())"
    )
    stat = group.path / "memory.stat"
    done = subprocess.run(
        [sys.executable, "-c", program, str(group.path / "cgroup.procs"), str(stat)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    fields = dict(line.split() for line in done.stdout.split("\n") if line)
    held = int(fields.get("anon", fields.get("rss", 0)))
    assert 20 * MIB <= held < 64 * MIB
    group.limit(None)


def test_a_limit_that_the_kernel_refuses(tmp_path: Path) -> None:
    with pytest.raises(LimitUnavailable, match=r"memory\.max"):
        MemoryGroup(tmp_path / "none", 2).limit(1)


def cgroup_tree(root: Path, version: int) -> Path:
    """A root with this process in /a/b; returns the group's folder. No kernel behind it."""
    (root / "proc/self").mkdir(parents=True)
    options = "rw" if version == 2 else "rw,memory"
    kind = "cgroup2" if version == 2 else "cgroup"
    (root / "proc/self/mountinfo").write_text(
        f"30 20 0:25 / /sys/fs/cgroup rw - {kind} {kind} {options}\n"
    )
    line = "0::/a/b" if version == 2 else "4:memory:/a/b\n0::/c"
    (root / "proc/self/cgroup").write_text(line + "\n")
    own = root / "sys/fs/cgroup/a/b"
    own.mkdir(parents=True)
    return own


def test_version_2_makes_it_beside_and_delegates(tmp_path: Path) -> None:
    own = cgroup_tree(tmp_path, 2)
    for folder in (own, own.parent, own.parent.parent):
        (folder / "cgroup.subtree_control").write_text("cpu")
    # Nobody fills the new folder as the kernel would, so it is refused; but where it was tried and
    # what was asked for can be seen.
    with pytest.raises(LimitUnavailable, match=r"no memory\.max"):
        make_group(tmp_path)
    assert (own.parent / "cgroup.subtree_control").read_text() == "+memory"
    assert sorted(entry.name for entry in own.parent.iterdir()) == ["b", "cgroup.subtree_control"]


def test_version_1_makes_it_below(tmp_path: Path) -> None:
    cgroup_tree(tmp_path, 1)
    with pytest.raises(LimitUnavailable, match=r"no memory\.limit_in_bytes"):
        make_group(tmp_path)


def test_no_controller_at_all(tmp_path: Path) -> None:
    with pytest.raises(LimitUnavailable, match="not mounted"):
        make_group(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_group_uses(tmp_path: Path, version: int) -> None:
    prefix = "" if version == 2 else "total_"
    cache = "file" if version == 2 else "cache"
    (tmp_path / "memory.stat").write_text(
        f"{prefix}{cache} 5000\n{prefix}shmem 1000\n{prefix}pgmajfault 7\nodd line\n"
    )
    used = "memory.current" if version == 2 else "memory.usage_in_bytes"
    (tmp_path / used).write_text("9000\n")
    use = MemoryGroup(tmp_path, version).use()
    assert (use.cache_nbytes, use.other_nbytes, use.major_faults) == (4000, 5000, 7)
