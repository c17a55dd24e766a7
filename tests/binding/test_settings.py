"""Hugepages, permissions and bindings that outlast a boot: each does only what it says."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from binding.machine import BDF, GROUP, SERIAL, Machine, codes
from spdk_kv.binding import persist, vfio
from spdk_kv.binding.journal import replace_file
from spdk_kv.devices.inspection.reasons import Refused

PAGES = "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
RULE = "run/udev/rules.d/70-spdk-kv-0000-01-00.0.rules"
UNIT = "etc/systemd/system/spdk-kv-vfio.service"
WANTS = "etc/systemd/system/multi-user.target.wants/spdk-kv-vfio.service"
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(vfio, "_SETTLE_S", 0.05)
    return Machine(tmp_path)


@pytest.fixture
def systemd(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    (machine.root / "run/systemd/system").mkdir(parents=True)
    (machine.root / "etc/systemd/system").mkdir(parents=True)
    # The checkout of a test lies wherever it lies; the rule itself has a test of its own.
    monkeypatch.setattr(persist, "_writable_by_others", lambda path: None)
    return machine


def pages(machine: Machine) -> int:
    return int((machine.root / PAGES).read_text())


@pytest.mark.parametrize(("amount", "then"), [("20", 20), ("64 MiB", 32), ("63MiB", 32)])
def test_hugepages_are_raised(machine: Machine, amount: str, then: int) -> None:
    report = machine.tool().hugepages(amount)
    assert (report.status, pages(machine)) == (0, then)
    assert "locked memory" in report.text()


@pytest.mark.parametrize("amount", ["5", "0", "10", "2 MiB"])
def test_hugepages_are_never_lowered(machine: Machine, amount: str) -> None:
    report = machine.tool().hugepages(amount)
    assert (report.status, pages(machine), machine.kernel.log) == (0, 10, [])


@pytest.mark.parametrize("amount", ["-1", "many", "64 GiB", "1.5", ""])
def test_hugepages_that_cannot_be_are_refused(machine: Machine, amount: str) -> None:
    report = machine.tool().hugepages(amount)
    if amount == "1.5":  # bytes: one page has room for them
        assert report.status == 0
        return
    assert (report.status, codes(report)) == (2, {"not-possible"})
    assert machine.kernel.log == []


def test_fewer_hugepages_than_asked_is_a_failure_and_keeps_them(machine: Machine) -> None:
    real = machine.kernel._act
    machine.kernel._act = lambda path, text: (  # type: ignore[method-assign]
        machine.write(PAGES, "15") if path == PAGES else real(path, text)
    )
    report = machine.tool().hugepages("20")
    assert (report.status, pages(machine)) == (3, 15)
    assert [text for _, text in machine.kernel.log] == ["20"]


def test_permissions_are_for_exactly_one_node(machine: Machine) -> None:
    machine.bind()
    machine.write("dev/vfio/15", "")
    other = (machine.root / "dev/vfio/15").stat()
    report = machine.tool().permissions(BDF, "kv")
    assert report.status == 0, report.text()
    rule = (machine.root / RULE).read_text().splitlines()[1]
    assert rule == f'SUBSYSTEM=="vfio", KERNEL=="{GROUP}", GROUP="kv", MODE="0660"'
    node = (machine.root / f"dev/vfio/{GROUP}").stat()
    assert (stat.S_IMODE(node.st_mode), node.st_gid) == (0o660, os.getgid())
    assert (machine.root / "dev/vfio/15").stat().st_mode == other.st_mode
    assert ["udevadm", "control", "--reload"] in machine.kernel.commands
    assert "memlock" in report.text()
    machine.tool().restore(BDF)
    assert not (machine.root / RULE).exists()


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_files_have_their_modes_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        for mode in (0o600, 0o644):
            replace_file(tmp_path / "file", "text", mode)
            assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    finally:
        os.umask(old)


def test_permissions_only_for_what_was_bound_here(machine: Machine) -> None:
    assert codes(machine.tool().permissions(BDF, "kv")) == {"not-ours"}
    machine.unlink_driver()
    machine.link_driver("vfio-pci", SERIAL)
    assert codes(machine.tool().permissions(BDF, "kv")) == {"not-ours"}
    assert not (machine.root / RULE).exists()


def test_permissions_not_for_a_binding_of_an_earlier_boot(machine: Machine) -> None:
    machine.bind()
    machine.write("proc/sys/kernel/random/boot_id", "boot-two")
    assert codes(machine.tool().permissions(BDF, "kv")) == {"not-ours"}


@pytest.mark.parametrize("group", ["nobody-has-it", 'kv", RUN+="/bin/sh', "kv\n", ""])
def test_permissions_for_no_such_group(
    machine: Machine, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.bind()
    if group != "nobody-has-it":  # a system that has it all the same
        monkeypatch.setattr(machine.kernel, "group_id", lambda name: os.getgid())
    assert codes(machine.tool().permissions(BDF, group)) == {"not-found"}
    assert not (machine.root / RULE).exists()


def test_permissions_not_for_a_group_that_has_grown(machine: Machine) -> None:
    machine.bind()
    machine.link(f"sys/kernel/iommu_groups/{GROUP}/devices/0000:01:00.1", "sys/x")
    assert codes(machine.tool().permissions(BDF, "kv")) == {"iommu-shared"}


def test_permissions_that_fail_are_rolled_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.bind()
    node = machine.root / f"dev/vfio/{GROUP}"
    node.chmod(0o600)

    def full(self: object, serial: str, group: str) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(persist.Persistence, "set_group", full)
    assert machine.tool().permissions(BDF, "kv").status == 3
    assert stat.S_IMODE(node.stat().st_mode) == 0o600
    assert not (machine.root / RULE).exists()


def boot(machine: Machine) -> None:
    """Everything below /run and every binding ends; the drive gets its kernel's name again."""
    for name in ("run/spdk_kv", "run/udev"):
        if (machine.root / name).exists():
            (machine.root / name).rename(machine.root / f"sys/old-{machine.minor}-{name[4:]}")
    machine.write("proc/sys/kernel/random/boot_id", f"boot-{machine.minor}")
    machine.write(f"{machine.device}/driver_override", "(null)")
    machine.unlink_driver()
    machine.link_driver("nvme", SERIAL)
    machine.kernel.log.clear()


def test_persistent_binding_is_made_again_with_its_permissions(systemd: Machine) -> None:
    assert systemd.bind(persist=True).status == 0
    assert systemd.tool().permissions(BDF, "kv").status == 0
    unit = (systemd.root / UNIT).read_text()
    assert 'ExecStart="/usr/bin/python3" "/opt/spdk_kv/setup_vfio.py" rebind' in unit
    assert (systemd.root / WANTS).resolve() == systemd.root / UNIT
    found = (systemd.root / "etc/spdk_kv/persist.json").stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    boot(systemd)
    report = systemd.tool().rebind()
    assert report.status == 0, report.text()
    assert systemd.driver_name() == "vfio-pci"
    assert (systemd.root / RULE).exists()
    assert systemd.tool().restore(BDF).status == 0
    assert not (systemd.root / WANTS).is_symlink()
    assert not (systemd.root / UNIT).exists()
    boot(systemd)
    assert systemd.tool().rebind().status == 0
    assert systemd.driver_name() == "nvme"


def test_without_persist_nothing_is_left_for_the_next_boot(systemd: Machine) -> None:
    assert systemd.bind().status == 0
    assert not (systemd.root / UNIT).exists()
    assert not (systemd.root / "etc/spdk_kv").exists()


def test_boot_makes_every_check_again(systemd: Machine) -> None:
    systemd.bind(persist=True)
    boot(systemd)
    systemd.mount("proc/1/task/1", f"259:{systemd.minor}", "/data", "none")
    report = systemd.tool().rebind()
    assert (report.status, codes(report)) == (2, {"mounted"})
    assert systemd.kernel.log == []


def put(machine: Machine, data: bytes) -> None:
    with (machine.root / "dev/nvme0n1").open("r+b") as file:
        file.write(data)


def test_boot_takes_a_store_but_no_unknown_data(systemd: Machine) -> None:
    systemd.bind(persist=True)
    boot(systemd)
    put(systemd, b"spdk_kv\0" + b"\1" * MIB)
    assert systemd.tool().rebind().status == 0
    boot(systemd)
    put(systemd, b"someone's")
    assert codes(systemd.tool().rebind()) == {"data"}


def test_boot_does_not_take_a_new_kind_of_contents(systemd: Machine) -> None:
    put(systemd, b"someone's")
    systemd.bind()
    assert systemd.bind(destroys=SERIAL, persist=True).status == 0
    boot(systemd)
    put(systemd, b"something else")  # all of it was given up
    assert systemd.tool().rebind().status == 0
    boot(systemd)
    os.system(f"/sbin/mkfs.ext4 -q -F {systemd.root}/dev/nvme0n1")
    assert codes(systemd.tool().rebind()) == {"signature"}


def test_boot_finds_the_drive_by_its_serial_alone(systemd: Machine) -> None:
    systemd.bind(persist=True)
    boot(systemd)
    systemd.write(f"{systemd.controller}/serial", "OTHER")
    assert codes(systemd.tool().rebind()) == {"not-found"}
    systemd.write(f"{systemd.controller}/serial", SERIAL)
    systemd.write("sys/devices/x/nvme/nvme1/serial", SERIAL)
    systemd.link("sys/bus/pci/devices/0000:02:00.0", "sys/devices/x")
    report = systemd.tool().rebind()  # two drives of one serial: which is meant?
    assert codes(report) == {"not-found"}
    assert systemd.kernel.log == []


def test_permissions_that_fail_at_boot_are_a_failure_not_a_refusal(systemd: Machine) -> None:
    systemd.bind(persist=True)
    systemd.tool().permissions(BDF, "kv")
    boot(systemd)
    systemd.write("run/udev", "in the way")
    report = systemd.tool().rebind()
    assert report.status == 3
    assert "permissions could not be set" in report.text()
    assert systemd.driver_name() == "vfio-pci"


def test_restore_that_cannot_end_the_persistence_says_so(systemd: Machine) -> None:
    systemd.bind(persist=True)
    (systemd.root / "etc/spdk_kv/persist.json").chmod(0o666)
    report = systemd.tool().restore(BDF)
    assert report.status == 3
    assert "is back with the driver nvme, but" not in report.text()
    assert "persist.json" in report.text()
    systemd.as_before()


def test_list_that_others_can_write_is_not_believed(systemd: Machine) -> None:
    systemd.bind(persist=True)
    (systemd.root / "etc/spdk_kv/persist.json").chmod(0o666)
    boot(systemd)
    assert codes(systemd.tool().rebind()) == {"journal"}


def test_persist_needs_systemd_and_asks_before_it_binds(machine: Machine) -> None:
    assert codes(machine.bind(persist=True)) == {"not-possible"}
    machine.as_before()


def test_persist_that_cannot_be_written_gives_the_drive_back(
    systemd: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, entries: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(persist.Persistence, "_write", full)
    report = systemd.bind(persist=True)
    assert (report.status, report.fields["rolled_back"]) == (3, True)
    assert not (systemd.root / UNIT).exists()
    assert not (systemd.root / WANTS).is_symlink()
    systemd.as_before()


def test_persist_with_a_list_that_cannot_be_read_is_refused_first(systemd: Machine) -> None:
    systemd.write("etc/spdk_kv/persist.json", "nonsense")
    assert codes(systemd.bind(persist=True)) == {"journal"}
    assert systemd.kernel.log == []


def test_persist_does_not_let_root_run_what_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = persist._writable_by_others
    # What lies above, /tmp with its open mode among them, is not of this test.
    monkeypatch.setattr(
        persist,
        "_writable_by_others",
        lambda path: judge(path) if tmp_path in (path, *path.parents) else None,
    )
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    script = tmp_path / "setup_vfio.py"
    script.write_text("")
    module = tmp_path / "package/deep/module.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    kept = persist.Persistence(tmp_path, [str(script)], tmp_path / "package")
    for path, mode in ((script, 0o666), (module, 0o666), (tmp_path, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(Refused) as refused:
            kept.check()
        assert str(path) in str(refused.value)
        path.chmod(before)
    kept.check()


def test_list_of_bindings_is_plain(systemd: Machine) -> None:
    systemd.bind(persist=True)
    values = json.loads((systemd.root / "etc/spdk_kv/persist.json").read_text())
    assert values == {"version": 1, "drives": [{"serial": SERIAL, "kinds": [], "group": None}]}
