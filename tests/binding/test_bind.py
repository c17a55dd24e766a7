"""Taking a drive: the order of the steps, a second look, failures at each step, and consent."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from binding.machine import BDF, GROUP, SERIAL, FakeKernel, Machine, codes
from spdk_kv.binding import vfio
from spdk_kv.binding.journal import Journal
from spdk_kv.binding.kernel import WritableKernel
from support.subprocesses import interruptible_fixture

DEVICE = f"sys/bus/pci/devices/{BDF}"
UNBIND = "drivers/nvme/unbind"


interruptible = interruptible_fixture


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(vfio, "_SETTLE_S", 0.05)
    return Machine(tmp_path)


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def with_ext4(machine: Machine) -> None:
    subprocess.run(["/sbin/mkfs.ext4", "-q", machine.root / "dev/nvme0n1"], check=True)


def test_dry_run_changes_nothing_and_says_what_it_would_do(machine: Machine) -> None:
    media = machine.media()
    report = machine.bind(yes=False)
    assert report.status == 0
    assert f"serial {SERIAL}" in report.text()
    assert "dry run" in report.text()
    assert "are zero" in report.text()
    assert machine.kernel.log == []
    assert all(command[0] in ("wipefs", "blkid") for command in machine.kernel.commands)
    machine.as_before()
    assert machine.media() == media


def test_steps_come_in_their_order_with_the_record_first(machine: Machine) -> None:
    states: list[object] = []

    def note() -> None:
        record = machine.record()
        states.append(record and record["state"])

    machine.kernel.faults = dict.fromkeys(("driver_override", "unbind", "drivers_probe"), note)
    media = machine.media()
    report = machine.bind()
    assert report.status == 0, report.text()
    assert machine.kernel.log == [
        (f"{DEVICE}/driver_override", "vfio-pci"),
        ("sys/bus/pci/drivers/nvme/unbind", BDF),
        ("sys/bus/pci/drivers_probe", BDF),
    ]
    assert states == ["binding"] * 3
    assert (machine.driver_name(), machine.override()) == ("vfio-pci", "vfio-pci")
    record = machine.record()
    assert record is not None
    assert (record["state"], record["bdf"], record["serial"]) == ("bound", BDF, SERIAL)
    assert (record["former_driver"], record["former_override"]) == ("nvme", None)
    assert report.fields["vfio_node"] == f"/dev/vfio/{GROUP}"
    del (after := machine.media())["nvme0n1"]
    del media["nvme0n1"]
    assert after == media


def test_wipefs_is_never_let_write(machine: Machine) -> None:
    machine.bind()
    wipefs = [command for command in machine.kernel.commands if command[0] == "wipefs"]
    assert wipefs
    assert all("--no-act" in command and "--all" not in command for command in wipefs)


def test_journal_is_roots_alone_and_on_the_medium(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def at_the_override() -> None:
        assert synced == [f".bound-{BDF}.json.new", "spdk_kv"]

    monkeypatch.setattr(os, "fsync", noting)
    machine.kernel.faults["driver_override"] = at_the_override
    old = os.umask(0)
    try:
        assert machine.bind().status == 0
    finally:
        os.umask(old)
    folder = machine.root / "run/spdk_kv"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / f"bound-{BDF}.json").stat().st_mode) == 0o600


def test_claims_are_held_until_the_old_driver_has_let_go(machine: Machine) -> None:
    def held() -> bool:
        links = (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.lexists(f"/proc/self/fd/{fd}"))  # fmt: skip
        return str(machine.root / "dev/nvme0n1") in links

    seen = []
    machine.kernel.faults[UNBIND] = lambda: seen.append(held())
    machine.kernel.faults["drivers_probe"] = lambda: seen.append(held())
    assert machine.bind().status == 0
    assert seen == [True, False]


# Each spoils the machine after the first look.
SECOND_LOOK: dict[str, tuple[str, Callable[[Machine], object]]] = {
    "mount": (
        "mounted",
        lambda m: m.mount("proc/1/task/1", "259:1", "/data", "/dev/nvme0n1"),
    ),
    "open": ("open", lambda m: m.symlink("proc/1/task/1/fd/9", "/dev/nvme0n1")),
    "serial": ("serial-mismatch", lambda m: m.write(f"{m.controller}/serial", "OTHER")),
    "number": ("changed", lambda m: m.write(f"{m.controller}/nvme0n1/dev", "259:9")),
    "partition": ("changed", lambda m: m.partition()),
    "writes": (
        "active-io",
        lambda m: m.write(f"{m.controller}/nvme0n1/stat", " ".join(["7"] * 4 + ["8"] * 13)),
    ),
    "fstab": ("configured", lambda m: m.write("etc/fstab", "/dev/nvme0n1 /data ext4")),
    "data": ("signature", with_ext4),
    "group": (
        "iommu-shared",
        lambda m: m.link(f"sys/kernel/iommu_groups/{GROUP}/devices/0000:01:00.1", "sys/x"),
    ),
}


@pytest.mark.parametrize("name", SECOND_LOOK)
def test_it_looks_again_just_before_the_unbind(machine: Machine, name: str) -> None:
    code, spoil = SECOND_LOOK[name]
    machine.kernel.faults["driver_override"] = lambda: (
        spoil(machine) if machine.override() == "(null)" else None  # once, at the bind
    )
    report = machine.bind()
    assert report.status == 2
    assert code in codes(report)
    assert [path for path, _ in machine.kernel.log] == [f"{DEVICE}/driver_override"] * 2
    machine.as_before()


def test_override_that_someone_else_took_back_stops_it(machine: Machine) -> None:
    # The kernel takes the write, and somebody clears it at once.
    real = machine.kernel._act

    def act(path: str, text: str) -> None:
        real(path, text)
        if text == "vfio-pci":
            machine.write(f"{machine.device}/driver_override", "(null)")

    machine.kernel._act = act  # type: ignore[method-assign]
    assert codes(machine.bind()) == {"changed"}
    machine.as_before()


def test_claim_taken_by_another_after_the_first_look(machine: Machine) -> None:
    opened = []
    real = machine.kernel.open_exclusive

    def second_fails(path: Path) -> int:
        opened.append(path)
        if len(opened) == 2:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(path)

    machine.kernel.open_exclusive = second_fails  # type: ignore[method-assign]
    report = machine.bind()
    assert (codes(report), report.status) == ({"open-exclusive"}, 2)
    assert machine.kernel.log == []
    machine.as_before()


def faults(machine: Machine) -> dict[str, Callable[[], object]]:
    """Ways in which a step fails; the kernel's answer to a rollback is sound."""
    kernel = machine.kernel

    def once(end: str) -> None:
        def fault() -> None:
            del kernel.faults[end]
            fail()

        kernel.faults[end] = fault

    return {
        "override": lambda: once("driver_override"),
        "unbind": lambda: once(UNBIND),
        "probe": lambda: once("drivers_probe"),
        "no driver binds": lambda: kernel.probe_gives.update({"vfio-pci": None}),
        "the wrong one binds": lambda: kernel.probe_gives.update({"vfio-pci": "nvme"}),
    }


@pytest.mark.parametrize(
    "fault", ["override", "unbind", "probe", "no driver binds", "the wrong one binds"]
)
def test_failed_step_is_rolled_back(machine: Machine, fault: str) -> None:
    faults(machine)[fault]()
    report = machine.bind()
    assert report.status == 3, report.text()
    assert report.fields["rolled_back"] is True
    assert "rolled back" in report.text()
    machine.as_before()


def test_error_that_nobody_foresaw_is_rolled_back(machine: Machine) -> None:
    def surprise() -> None:
        machine.kernel.faults.clear()
        raise RuntimeError("a bug")

    machine.kernel.faults["drivers_probe"] = surprise
    report = machine.bind()
    assert (report.status, report.fields["failure"]) == (3, "a bug")
    machine.as_before()


def test_node_that_does_not_appear_is_rolled_back(machine: Machine) -> None:
    (machine.root / "dev/vfio").rmdir()
    machine.symlink("dev/vfio", "nowhere")
    real = machine.link_driver
    machine.link_driver = lambda name, serial: (  # type: ignore[method-assign]
        machine.link(f"{machine.device}/driver", "sys/bus/pci/drivers/vfio-pci")
        if name == "vfio-pci"
        else real(name, serial)
    )
    report = machine.bind()
    assert (report.status, report.fields["rolled_back"]) == (3, True), report.text()
    machine.as_before()


def test_module_that_does_not_load_is_rolled_back(machine: Machine) -> None:
    from spdk_kv.devices.inspection.kernel import Completed

    (machine.root / "sys/bus/pci/drivers/vfio-pci").rename(machine.root / "sys/none")
    machine.write("lib/modules/6.1.0/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko:")
    machine.kernel.answers["modprobe", ""] = Completed(1, "", "Operation not permitted")
    report = machine.bind()
    assert report.status == 3
    assert "Operation not permitted" in report.text()
    assert machine.kernel.log == []
    machine.as_before()
    del machine.kernel.answers["modprobe", ""]
    (machine.root / "sys/bus/pci/drivers/vfio-pci/unbind").unlink(missing_ok=True)
    (machine.root / "sys/bus/pci/drivers/vfio-pci").rename(machine.root / "sys/none2")
    assert machine.bind().status == 0  # loaded by modprobe


def test_rollback_that_fails_too_says_so_and_keeps_the_record(machine: Machine) -> None:
    machine.kernel.faults["drivers_probe"] = fail
    report = machine.bind()
    assert (report.status, report.fields["rolled_back"]) == (3, False)
    assert f"restore {BDF}" in report.text()
    record = machine.record()
    assert record is not None
    assert record["state"] == "restoring"
    machine.kernel.faults.clear()
    assert codes(machine.bind()) == {"unfinished"}
    assert machine.tool().restore().status == 0
    machine.as_before()


@pytest.mark.parametrize("full", ["journal", "final"])
def test_journal_that_cannot_be_written_stops_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    write, calls = Journal.write, []

    def failing(self: Journal, record: object) -> None:
        calls.append(record)
        if len(calls) == (1 if full == "journal" else 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "write", failing)
    report = machine.bind()
    assert (report.status, report.fields["rolled_back"]) == (3, True)
    assert bool(machine.kernel.log) == (full == "final")
    machine.as_before()


@pytest.mark.usefixtures("interruptible")
def test_signal_waits_until_the_drive_has_a_driver(machine: Machine) -> None:
    machine.kernel.faults[UNBIND] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        machine.bind()
    assert machine.driver_name() == "vfio-pci"
    record = machine.record()
    assert record is not None
    assert record["state"] == "bound"


def test_second_run_at_the_same_time_is_refused(machine: Machine) -> None:
    with Journal(machine.root).locked():
        assert codes(machine.bind()) == {"busy"}
        assert codes(machine.tool().restore()) == {"busy"}
        assert codes(machine.tool().hugepages("20")) == {"busy"}


def test_bound_drive_is_done_already(machine: Machine) -> None:
    machine.bind()
    machine.kernel.log.clear()
    assert machine.bind().status == 0
    assert codes(machine.tool().bind(BDF, "OTHER", yes=True)) == {"serial-mismatch"}
    assert machine.kernel.log == []


@pytest.mark.parametrize("former", ["nvme", "vfio-pci"])
def test_former_override_is_kept(machine: Machine, former: str) -> None:
    machine.write(f"{machine.device}/driver_override", former)
    assert machine.bind().status == 0
    assert machine.tool().restore(BDF).status == 0
    assert (machine.driver_name(), machine.override()) == ("nvme", former)


def test_report_is_printable_whatever_a_drive_says(machine: Machine) -> None:
    machine.write(f"{machine.controller}/model", "ACME\x1b[2J\nrefused")
    text = machine.bind(yes=False).text()
    assert "\x1b" not in text
    assert "\\x1b" in text


def test_record_is_one_json_object(machine: Machine) -> None:
    report = machine.bind()
    values = json.loads(report.json())
    assert values["outcome"] == "done"
    assert (values["bdf"], values["serial"], values["state"]) == (BDF, SERIAL, "bound")


def test_kernel_writes_never_create_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WritableKernel().write(tmp_path / "driver_override", "vfio-pci")
    assert FakeKernel.write is not WritableKernel.write
