"""What the checks rely on, asked of this machine's own kernel, on a loop device of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdk_kv.devices.inspection.claims import claim
from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.sightings import Opened, Sightings
from spdk_kv.devices.inspection.stack import Disk, Stack

ROOT = Path("/")
# Holds argv[1] open as argv[2] says, until its input ends.
HOLDER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "mapped":
    kept = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


def losetup(*arguments: object) -> str:
    tool = shutil.which("losetup", path="/usr/sbin:/sbin")
    if os.geteuid() != 0 or tool is None:
        pytest.skip("loop devices need root and losetup")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 4 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    device = losetup("--find", "--show", image)
    try:
        yield Path(device)
    finally:
        losetup("--detach", device)


def disk_of(node: Path) -> Disk:
    return Disk(node.name, Kernel().device_number(node), 4 << 20, ())


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """A mount point, free again afterwards whatever a test has left there."""
    folder = tmp_path / "point"
    folder.mkdir()
    yield folder
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_claim_keeps_mount_and_other_claims_out(node: Path, point: Path) -> None:
    kernel = Kernel()
    mount = ["mount", "-o", "ro", str(node), str(point)]
    with claim(ROOT, kernel, [disk_of(node)]) as claims:
        assert claims.refusals == []
        assert subprocess.run(mount, capture_output=True, check=False).returncode != 0
        with claim(ROOT, kernel, [disk_of(node)]) as second:
            assert [reason.code.value for reason in second.refusals] == ["open-exclusive"]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let us mount")
    with claim(ROOT, kernel, [disk_of(node)]) as third:
        assert [reason.code.value for reason in third.refusals] == ["open-exclusive"]


def test_claim_on_a_node_of_another_device_is_refused(node: Path) -> None:
    wrong = Disk(node.name, "b1:1", 4 << 20, ())
    with claim(ROOT, Kernel(), [wrong]) as claims:
        assert [reason.code.value for reason in claims.refusals] == ["changed"]


def test_loop_device_tells_the_device_behind_it(node: Path) -> None:
    kernel = Kernel()
    assert kernel.loop_backing_number(node) is None  # a file
    upper = losetup("--find", "--show", "--read-only", node)
    try:
        assert kernel.loop_backing_number(Path(upper)) == kernel.device_number(node)
    finally:
        losetup("--detach", upper)


def look(way: str, tasks: list[Path]) -> Opened:
    sightings = Sightings(ROOT, Kernel())
    if way == "open":
        return sightings.opened(tasks)
    found = Opened()
    sightings.map_into(found, tasks)
    return found


@pytest.mark.parametrize("way", ["open", "mapped"])
@pytest.mark.parametrize("named", [True, False])
def test_holder_of_a_device_is_found(node: Path, tmp_path: Path, way: str, named: bool) -> None:
    number = Kernel().device_number(node)
    assert number is not None
    opened = node
    if not named:
        opened = tmp_path / "other-name"
        os.mknod(opened, 0o060600, os.stat(node).st_rdev)
    disk = Disk(node.name, number, 4 << 20, ())
    stack = Stack((), (disk,), (), (), {number: node.name}, {})
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, opened, way],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            if child.stdout.readline() != "ready\n":
                pytest.skip("device nodes cannot be opened there")
            tasks = [Path(f"/proc/{child.pid}/task/{child.pid}")]
            assert look(way, tasks).on(stack) == {node.name}
        finally:
            child.stdin.close()


def test_kernel_threads_and_ended_processes_are_no_trouble() -> None:
    child = subprocess.Popen(["/bin/true"])
    try:
        zombie = Path(f"/proc/{child.pid}/task/{child.pid}")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        for task in (Path("/proc/2/task/2"), zombie, Path("/proc/4194304/task/4194304")):
            assert look("open", [task]) == look("mapped", [task]) == Opened()
    finally:
        child.wait()
