"""scripts/setup_vfio.py and `spdk-kv device`: what they print, and their exit statuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from binding.machine import BDF, GROUP, SERIAL, Machine
from spdk_kv.devices.inspection.reasons import Code
from support.places import ROOT
from support.waiting import PATIENCE_S

SCRIPT = ROOT / "scripts/setup_vfio.py"
# The system's Python, with nothing installed.
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable

DRIVE_FIELDS = {
    "bdf": str,
    "serial": (str, type(None)),
    "model": (str, type(None)),
    "nbytes": (int, type(None)),
    "driver": (str, type(None)),
    "iommu_group": (str, type(None)),
    "iommu_group_members": list,
    "numa_node": (int, type(None)),
    "namespaces": list,
    "state": str,
    "may_be_taken": bool,
    "reasons": list,
    "note": str,
}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-I", SCRIPT, "--root", root, *arguments],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip


def check_status(values: dict[str, object]) -> list[dict[str, object]]:
    """Asserts the form that `status --json` keeps."""
    assert set(values) == {"outcome", "reasons", "drives"}
    drives = values["drives"]
    assert isinstance(drives, list)
    for drive in drives:
        assert set(drive) == set(DRIVE_FIELDS)
        for name, kind in DRIVE_FIELDS.items():
            assert isinstance(drive[name], kind), name  # type: ignore[arg-type]
        for reason in drive["reasons"]:
            assert set(reason) == {"code", "found"}
            Code(reason["code"])
    return drives


def test_script_needs_nothing_installed() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import spdk_kv.binding.commands\n"
        "paths = [m.__file__ or '' for m in sys.modules.values() if hasattr(m, '__file__')]\n"
        "print([p for p in paths if 'site-packages' in p or 'dist-packages' in p])\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('spdk_kv.')}\n"
        "print(sorted(rooms - {'binding', 'devices', 'units', 'errors'}))"
    )
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout == "[]\n[]\n"


def test_script_leaves_no_bytecode_in_the_checkout(tmp_path: Path) -> None:
    for room in ("binding", "devices"):
        shutil.copytree(ROOT / "spdk_kv" / room, tmp_path / "spdk_kv" / room,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for name in ("__init__.py", "units.py", "errors.py"):
        shutil.copy(ROOT / "spdk_kv" / name, tmp_path / "spdk_kv")
    (tmp_path / "scripts").mkdir()
    copy = shutil.copy(SCRIPT, tmp_path / "scripts")
    done = subprocess.run(
        [PYTHON, copy, "--root", tmp_path, "status"],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "no NVMe drive on PCI\n")
    assert not list(tmp_path.rglob("__pycache__"))


def test_exit_statuses_are_those_promised(machine: Machine) -> None:
    # A tree of plain files: the real kernel knows no such devices, so nodes are not what they
    # should be, and that is a refusal as well.
    assert run(machine.root, "status").returncode == 0
    for arguments in (
        ("bind", BDF, SERIAL),
        ("bind", BDF, SERIAL, "--yes"),
        ("bind", "all", SERIAL, "--yes"),
        ("bind", BDF),
        ("bind", BDF, SERIAL, "--force"),
        ("bind", BDF, SERIAL, "--y"),  # no abbreviations
        ("restore", BDF),
        ("permissions", BDF, "--group", "root"),
        ("hugepages", "-1"),
        ("hugepages", "many"),
        (),
    ):
        done = run(machine.root, *arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert done.stdout == ""
        assert done.stderr
    assert run(machine.root, "restore").returncode == 0
    machine.as_before()


@pytest.mark.skipif(os.geteuid() != 0, reason="hugepages are refused to other users than root")
def test_exit_status_of_hugepages(machine: Machine) -> None:
    path = machine.root / "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    assert run(machine.root, "hugepages", "20").returncode == 0
    assert path.read_text().startswith("20")
    path.unlink()
    path.symlink_to("/dev/full")  # endless, and takes nothing: unreadable as a number
    assert run(machine.root, "hugepages", "30").returncode == 2


def test_failure_is_exit_status_3(machine: Machine) -> None:
    machine.kernel.probe_gives["vfio-pci"] = None
    from spdk_kv.binding import vfio

    vfio._SETTLE_S, before = 0.05, vfio._SETTLE_S
    try:
        report = machine.bind()
    finally:
        vfio._SETTLE_S = before
    assert (report.status, json.loads(report.json())["outcome"]) == (3, "failed")


def test_refusal_as_json_has_codes(machine: Machine) -> None:
    done = run(machine.root, "bind", BDF, "OTHER", "--json")
    values = json.loads(done.stdout)
    assert (done.returncode, values["outcome"]) == (2, "refused")
    assert "serial-mismatch" in {reason["code"] for reason in values["reasons"]}


def test_status_as_json_keeps_its_form(machine: Machine) -> None:
    (drive,) = check_status(json.loads(run(machine.root, "status", "--json").stdout))
    assert (drive["bdf"], drive["serial"], drive["driver"]) == (BDF, SERIAL, "nvme")
    assert (drive["iommu_group"], drive["iommu_group_members"]) == (GROUP, [BDF])
    assert drive["may_be_taken"] is False


def test_status_tells_free_from_used_and_bound(machine: Machine) -> None:
    def state() -> tuple[object, object]:
        (drive,) = check_status(json.loads(machine.tool().status().json()))
        return drive["state"], drive["may_be_taken"]

    assert state() == ("free", True)
    machine.write("etc/fstab", "/dev/nvme0n1 /data ext4")
    assert state() == ("in-use", False)
    assert "configured: /etc/fstab names /dev/nvme0n1" in machine.tool().status().text()
    (machine.root / "etc/fstab").unlink()
    with (machine.root / "dev/nvme0n1").open("r+b") as file:
        file.write(b"x")
    assert state() == ("has-data", False)
    os.truncate(machine.root / "dev/nvme0n1", 0)
    os.truncate(machine.root / "dev/nvme0n1", 8 << 20)
    machine.link(f"sys/kernel/iommu_groups/{GROUP}/devices/0000:01:00.1", "sys/x")
    assert state() == ("refused", False)
    assert "0000:01:00.1" in machine.tool().status().text()
    (machine.root / f"sys/kernel/iommu_groups/{GROUP}/devices/0000:01:00.1").unlink()
    assert machine.bind().status == 0
    assert state() == ("bound", False)
    (drive,) = check_status(json.loads(machine.tool().status().json()))
    assert (drive["serial"], drive["driver"]) == (SERIAL, "vfio-pci")
    record = machine.root / f"run/spdk_kv/bound-{BDF}.json"
    record.write_text(record.read_text().replace('"bound"', '"binding"'))
    assert state() == ("unfinished", False)


def test_status_changes_nothing(machine: Machine) -> None:
    before = sorted(str(path) for path in machine.root.rglob("*"))
    machine.tool().status()
    assert sorted(str(path) for path in machine.root.rglob("*")) == before
    assert machine.kernel.log == []


def test_group_of_the_command_line_shares_it_all() -> None:
    from click.testing import CliRunner

    from spdk_kv.cli import main

    listing = CliRunner().invoke(main, ["device", "--help"])
    for name in ("status", "bind", "restore", "hugepages", "permissions"):
        assert name in listing.output
    refused = CliRunner().invoke(main, ["device", "bind", "all", SERIAL, "--json"])
    assert refused.exit_code == 2
    assert json.loads(refused.output)["reasons"][0]["code"] == "not-found"
    assert CliRunner().invoke(main, ["device", "bind", BDF]).exit_code == 2
    (values,) = [json.loads(CliRunner().invoke(main, ["device", "status", "--json"]).output)]
    check_status(values)
