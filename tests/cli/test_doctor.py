"""The command line's frame (help, exit statuses, pipes) and the doctor, run as users run them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from spdk_kv.cli.doctor import checks as judge
from spdk_kv.cli.main import COMMANDS, LazyGroup, main
from spdk_kv.devices.host import Host, HugepagePool
from spdk_kv.devices.io_uring import IoUringStatus
from spdk_kv.devices.nvme import Namespace, NvmeDrive
from spdk_kv.memory.available import CgroupLimit, MemorySnapshot
from support.subprocesses import interruptible_fixture
from support.terminal import run_on_terminal
from support.waiting import PATIENCE_S

interruptible = interruptible_fixture
MIB = 1 << 20
GIB = 1 << 30

GOOD_HOST = Host(
    kernel="6.12.0",
    cpu_count=8,
    available_nbytes=16 * GIB,
    hugepage_nbytes=2 * MIB,
    hugepage_pools=(HugepagePool(2 * MIB, 1024, 1024),),
    hugepage_mounts=("/dev/hugepages",),
    memlock_nbytes=None,
    memlock_exempt=False,
    iommu_groups=12,
    iommu_units=("dmar0",),
    vfio_pci="loaded",
    io_uring=IoUringStatus(available=True, error=None, sysctl=0),
    container_hints=(),
)

# A group with commands that end in each way there is; argv: the way.
ENDINGS = """
import sys, time, click
from spdk_kv.cli.lazy import LazyGroup
from spdk_kv.errors import KeyNotFound

@click.command()
def fail(): raise KeyNotFound("no blob called 'x'")

@click.command()
def wait():
    print("ready", flush=True)
    time.sleep(600)

@click.command()
def flood():
    for _ in range(100_000): click.echo("line of text")

@click.command()
def bar():
    from spdk_kv.terminal import progress
    with progress(10, "reading drive") as advance:
        for _ in range(10): advance(1); time.sleep(0.02)
    print("done")

if __name__ == "__main__":
    sys.modules["endings"] = sys.modules["__main__"]
    names = ("fail", "wait", "flood", "bar")
    LazyGroup("x", commands_at={name: (f"endings:{name}", "") for name in names})()
"""


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def endings(tmp_path: Path) -> str:
    script = tmp_path / "endings.py"
    script.write_text(ENDINGS)
    return str(script)


# --- the frame


def test_help_lists_every_command_without_loading_torch() -> None:
    result = python(
        "-c",
        "import sys, atexit\n"
        "atexit.register(lambda: print('LOADED', 'torch' in sys.modules, 'rich' in sys.modules))\n"
        "from spdk_kv.cli import main\n"
        "main(['--help'])",
    )
    assert result.returncode == 0, result.stderr
    width = max(map(len, COMMANDS)) + 2
    for name, (_, line) in COMMANDS.items():
        assert f"{name:<{width}}{line}"[:70] in result.stdout
    assert "LOADED False False" in result.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_exists_and_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"Usage: main {name}" in result.output


def test_module_runs_as_the_command() -> None:
    result = python("-m", "spdk_kv", "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("spdk-kv, version ")


def test_verbose_logs_our_own_logger_and_no_other() -> None:
    result = python(
        "-c",
        "import logging\nfrom spdk_kv.cli import main\nmain.callback(verbose=1)\n"
        "logging.getLogger('spdk_kv.store').info('opened')\n"
        "logging.getLogger('spdk_kv.store').debug('hidden')\n"
        "logging.getLogger('torch').info('chatter')",
    )
    assert (result.stdout, result.stderr) == ("", "INFO spdk_kv.store: opened\n")


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["no-such-command"])
    assert result.exit_code == 2
    assert "No such command" in result.output


def test_own_errors_are_one_line_on_stderr_and_status_1(endings: str) -> None:
    result = python(endings, "fail")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no blob called 'x'\n"


def test_foreign_errors_keep_their_traceback() -> None:
    @click.command()
    def bug() -> None:
        raise ZeroDivisionError("a bug")

    sys.modules["a_bug"] = type(sys)("a_bug")
    sys.modules["a_bug"].bug = bug  # type: ignore[attr-defined]
    try:
        result = CliRunner().invoke(LazyGroup("x", commands_at={"bug": ("a_bug:bug", "")}), ["bug"])
    finally:
        del sys.modules["a_bug"]
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_is_one_line_and_status_130(endings: str) -> None:
    process = subprocess.Popen(
        [sys.executable, endings, "wait"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, complaint.strip()) == (130, "interrupted")


def test_reader_that_goes_away_makes_no_noise(endings: str) -> None:
    process = subprocess.Popen(
        [sys.executable, endings, "flood"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line of text\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=PATIENCE_S) == 1


def test_progress_bar_is_for_terminals_only(endings: str) -> None:
    piped = python(endings, "bar", env=os.environ | {"FORCE_COLOR": "1"})
    assert (piped.stdout, piped.stderr) == ("done\n", "")
    assert "reading drive" in run_on_terminal([sys.executable, endings, "bar"])


# --- the doctor as a whole


def test_json_has_the_stable_keys() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"checks", "engines", "drives", "memory"}
    for check in report["checks"]:
        assert set(check) == {"name", "status", "found", "remedy"}
        assert check["status"] in ("ok", "missing", "limited", "info")
        assert check["found"]
    for engine in report["engines"]:
        assert set(engine) == {"name", "available", "reason", "remedy"}
        assert engine["available"] or engine["reason"]
    assert {check["name"] for check in report["checks"]} >= {
        "system", "memory", "hugepages", "memlock", "iommu", "vfio", "io_uring", "gpu"
    }  # fmt: skip
    assert report["memory"]["available_for_page_cache_nbytes"] > 0


def test_report_is_whole_in_a_pipe_and_on_a_narrow_terminal() -> None:
    report = json.loads(python("-m", "spdk_kv", "doctor", "--json").stdout)
    # Free memory and pages move between the runs, so those lines are left out.
    moving = ("memory", "hugepages")
    checks = [check for check in report["checks"] if check["name"] not in moving]
    piped = python("-m", "spdk_kv", "doctor", env=os.environ | {"FORCE_COLOR": "1"})
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout
    shown = run_on_terminal([sys.executable, "-m", "spdk_kv", "doctor"])
    assert "\x1b[" in shown
    assert "…" not in shown + piped.stdout
    for check in checks:
        for text in (shown, piped.stdout):
            flat = " ".join(text.split())
            assert all(word in flat for word in check["found"].split()), check
            assert check["remedy"] in text  # on one line, to be copied
        assert " ".join(check["found"].split()) in " ".join(piped.stdout.split())
    for line in piped.stdout.splitlines():
        assert len(line) <= 80 or "fix: " in line


# --- its verdicts


def test_good_host_needs_nothing() -> None:
    verdicts = [
        judge.check_hugepages(GOOD_HOST),
        judge.check_memlock(GOOD_HOST),
        judge.check_iommu(GOOD_HOST),
        judge.check_vfio(GOOD_HOST),
        judge.check_io_uring(GOOD_HOST.io_uring),
        judge.check_memory(MemorySnapshot(32 * GIB, 16 * GIB, (), ())),
    ]
    assert {(verdict.status, verdict.remedy) for verdict in verdicts} == {("ok", "")}


@pytest.mark.parametrize(
    ("pools", "default", "status", "remedy"),
    [
        ([(2 * MIB, 0, 0)], 2 * MIB, "missing", "sudo sysctl vm.nr_hugepages=1024"),
        # 600 pages belong to others: they stay, and ours come on top.
        ([(2 * MIB, 700, 100)], 2 * MIB, "limited", "sudo sysctl vm.nr_hugepages=1624"),
        ([(2 * MIB, 0, 0), (GIB, 1, 1)], 2 * MIB, "limited", "sudo sysctl vm.nr_hugepages=512"),
        ([(512 * MIB, 0, 0)], 512 * MIB, "missing", "sudo sysctl vm.nr_hugepages=4"),
        ([(2 * MIB, 0, 0), (GIB, 2, 2)], 2 * MIB, "ok", ""),
        ([], None, "missing", "boot a kernel that has CONFIG_HUGETLBFS"),
    ],
)
def test_hugepages_ask_for_what_is_lacking_and_never_shrink(
    pools: list[tuple[int, int, int]], default: int | None, status: str, remedy: str
) -> None:
    host = replace(
        GOOD_HOST,
        hugepage_nbytes=default,
        hugepage_pools=tuple(HugepagePool(*pool) for pool in pools),
    )
    check = judge.check_hugepages(host)
    assert (check.status, check.remedy) == (status, remedy)


def test_unmounted_hugetlbfs_is_mended_by_a_mount() -> None:
    check = judge.check_hugepages(replace(GOOD_HOST, hugepage_mounts=()))
    assert check.status == "limited"
    assert "mount -t hugetlbfs" in check.remedy
    assert "sysctl" not in check.remedy


@pytest.mark.parametrize(
    ("limit", "exempt", "status"),
    [
        (8 * MIB, False, "limited"),
        (8 * MIB, True, "ok"),
        (2 * GIB, False, "ok"),
        (None, False, "ok"),
    ],
)
def test_memlock(limit: int | None, exempt: bool, status: str) -> None:
    host = replace(GOOD_HOST, memlock_nbytes=limit, memlock_exempt=exempt)
    check = judge.check_memlock(host)
    assert check.status == status
    assert ("ulimit -l unlimited" in check.remedy) == (status == "limited")


def test_iommu_unit_without_groups_is_missing() -> None:
    check = judge.check_iommu(replace(GOOD_HOST, iommu_groups=0))
    assert check.status == "missing"
    assert "dmar0" in check.found
    assert "intel_iommu=on" in check.remedy


def test_vfio_that_is_only_not_loaded_is_loaded_by_modprobe() -> None:
    check = judge.check_vfio(replace(GOOD_HOST, vfio_pci="available"))
    assert (check.status, check.remedy) == ("limited", "sudo modprobe vfio-pci")
    assert judge.check_vfio(replace(GOOD_HOST, vfio_pci="missing")).status == "missing"


@pytest.mark.parametrize(
    ("error", "sysctl", "remedy"),
    [
        (errno.EPERM, 2, "kernel.io_uring_disabled=0"),
        (errno.EPERM, 0, "seccomp"),
        (errno.ENOSYS, None, "Linux 5.11 or newer"),
        (errno.ENOMEM, None, "ulimit -l"),
    ],
)
def test_io_uring_remedy_fits_the_refusal(error: int, sysctl: int | None, remedy: str) -> None:
    check = judge.check_io_uring(IoUringStatus(available=False, error=error, sysctl=sysctl))
    assert check.status == "missing"
    assert remedy in check.remedy


def test_memory_is_limited_only_by_a_cgroup_that_is_tighter() -> None:
    wide = MemorySnapshot(32 * GIB, 16 * GIB, (CgroupLimit("/c", 64 * GIB, 0, 0),), ())
    assert judge.check_memory(wide).status == "ok"
    tight = replace(wide, limits=(*wide.limits, CgroupLimit("/c/d", 4 * GIB, GIB, 0)))
    check = judge.check_memory(tight)
    assert check.status == "limited"
    assert "the page cache may use 3.0 GiB" in check.found
    assert "/c/d" in check.found
    assert "MemoryMax=" in check.remedy
    assert judge.check_memory(replace(wide, available_nbytes=None)).remedy


def test_drive_line_says_what_holds_it() -> None:
    namespace = Namespace(
        "nvme0n1", "/dev/nvme0n1", "/dev/ng0n1", GIB, 512, ("nvme0n1p1",), ("dm-0",), ("/home",)
    )
    members = ("0000:01:00.0", "0000:01:00.1")
    drive = NvmeDrive(
        "0000:01:00.0", "S1", "ACME", "1", "nvme", "7", members, None, (namespace,)
    )  # fmt: skip
    (check,) = judge.check_drives([drive])
    assert check.name == "nvme 0000:01:00.0"
    for fact in ("S1", "1.0 GiB", "/dev/nvme0n1", "/home", "used by dm-0", "with 0000:01:00.1"):
        assert fact in check.found
    free = replace(drive, namespaces=(replace(namespace, holders=(), mount_points=()),))
    assert "not mounted" in judge.check_drives([free])[0].found
    away = replace(drive, driver="vfio-pci", serial=None, namespaces=())
    # Nobody can see whether it was in use, so nothing is claimed.
    assert "not mounted" not in judge.check_drives([away])[0].found
    assert judge.check_drives([])[0].status == "missing"


def test_container_is_told_where_the_commands_belong() -> None:
    check = judge.check_system(replace(GOOD_HOST, container_hints=("/.dockerenv",)))
    assert "/.dockerenv" in check.found
    assert "container" not in judge.check_system(GOOD_HOST).found
