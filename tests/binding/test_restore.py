"""Giving a drive back: only what was bound here, whatever an interruption has left."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from binding.machine import BDF, GROUP, SERIAL, Machine, codes
from spdk_kv.binding import vfio
from spdk_kv.binding.journal import BINDING, Journal, Record
from spdk_kv.binding.vfio import bind_steps, give_back_steps
from spdk_kv.devices.inspection.facts import read_facts
from support.subprocesses import interruptible_fixture

BIND_STEPS = ["journal", "load", "override", "look-again", "unbind", "probe", "verify", "done"]
BACK_STEPS = ["journal", "override", "unbind", "probe", "verify", "clear-override", "done"]


interruptible = interruptible_fixture


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(vfio, "_SETTLE_S", 0.05)
    return Machine(tmp_path)


@pytest.fixture
def bound(machine: Machine) -> Machine:
    assert machine.bind().status == 0
    machine.kernel.log.clear()
    return machine


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def the_record(machine: Machine) -> Record:
    facts = read_facts(machine.root, machine.kernel, BDF)
    return Record(BDF, SERIAL, "ACME Fast", "nvme", None, GROUP, "boot-one", facts.inode, BINDING)


def test_bound_drive_goes_back_and_nothing_remains(bound: Machine) -> None:
    report = bound.tool().restore(BDF)
    assert report.status == 0, report.text()
    assert [text for _, text in bound.kernel.log] == ["nvme", BDF, BDF, "\n"]
    bound.as_before()
    assert bound.tool().restore().status == 0
    assert codes(bound.tool().restore(BDF)) == {"not-ours"}


def test_without_an_address_every_bound_drive_goes_back(bound: Machine) -> None:
    report = bound.tool().restore()
    assert (report.status, report.fields["drives"][0]["bdf"]) == (0, BDF)
    bound.as_before()


@pytest.mark.parametrize("made", range(len(BIND_STEPS)))
def test_bind_interrupted_after_any_step_is_undone(machine: Machine, made: int) -> None:
    with Journal(machine.root).locked():
        pass  # makes the folder
    journal, record = Journal(machine.root), the_record(machine)
    steps = bind_steps(machine.root, machine.kernel, journal, record, lambda: None)
    for expected in BIND_STEPS[: made + 1]:
        assert next(steps) == expected  # the step named last is not made
    steps.close()
    if machine.record() is not None:
        assert machine.record()["state"] == "binding"  # type: ignore[index]
    report = machine.tool().restore()
    assert report.status == 0, report.text()
    machine.as_before()
    assert machine.bind(yes=False).status == 0


@pytest.mark.parametrize("made", range(len(BACK_STEPS)))
def test_restore_interrupted_after_any_step_is_finished(bound: Machine, made: int) -> None:
    (record,) = Journal(bound.root).records()
    steps = give_back_steps(bound.root, bound.kernel, Journal(bound.root), record)
    for expected in BACK_STEPS[: made + 1]:
        assert next(steps) == expected
    steps.close()
    report = bound.tool().restore(BDF)
    assert report.status == 0, report.text()
    bound.as_before()


@pytest.mark.parametrize("made", range(3, 6))
def test_bind_after_an_interrupted_bind_asks_for_restore(machine: Machine, made: int) -> None:
    with Journal(machine.root).locked():
        pass
    journal, record = Journal(machine.root), the_record(machine)
    steps = bind_steps(machine.root, machine.kernel, journal, record, lambda: None)
    for _ in range(made):
        next(steps)
    machine.kernel.log.clear()
    assert codes(machine.bind()) == {"unfinished"}
    assert machine.kernel.log == []


def test_interrupted_bind_never_unbinds_the_kernels_driver(machine: Machine) -> None:
    with Journal(machine.root).locked():
        pass
    journal = Journal(machine.root)
    steps = bind_steps(machine.root, machine.kernel, journal, the_record(machine), lambda: None)
    for _ in range(4):  # the override is set, and that is all
        next(steps)
    machine.kernel.log.clear()
    assert machine.tool().restore().status == 0
    assert [(Path(path).name, text) for path, text in machine.kernel.log] == [
        ("driver_override", "\n")
    ]


def test_drive_in_use_over_vfio_stays(bound: Machine) -> None:
    bound.symlink(f"{bound.process('77', 'spdk')}/fd/8", f"/dev/vfio/{GROUP}")
    report = bound.tool().restore(BDF)
    assert (report.status, codes(report)) == (2, {"in-use"})
    assert "77 (spdk)" in report.text()
    assert bound.kernel.log == []
    assert bound.driver_name() == "vfio-pci"
    (bound.root / "proc/77/task/77/fd/8").unlink()
    bound.symlink("proc/77/task/77/fd/9", "/dev/vfio/vfio")  # the container alone holds nothing
    assert bound.tool().restore(BDF).status == 0


def test_drive_in_use_over_the_newer_interface_stays(bound: Machine) -> None:
    bound.write(f"{bound.device}/vfio-dev/vfio3/dev", "511:3")
    bound.write("dev/vfio/devices/vfio3", "")
    bound.symlink(f"{bound.process('77', 'spdk')}/fd/8", "/dev/vfio/devices/vfio3")
    assert codes(bound.tool().restore(BDF)) == {"in-use"}


@pytest.mark.parametrize("change", ["driver", "override"])
def test_what_someone_else_has_changed_is_left_alone(bound: Machine, change: str) -> None:
    if change == "driver":
        bound.unlink_driver()
        bound.link_driver("uio_pci_generic", SERIAL)
    else:
        bound.write(f"{bound.device}/driver_override", "uio_pci_generic")
    report = bound.tool().restore(BDF)
    assert (report.status, codes(report)) == (2, {"changed"})
    assert bound.kernel.log == []
    assert bound.record() is not None


def test_reboot_has_given_it_back(bound: Machine) -> None:
    bound.write("proc/sys/kernel/random/boot_id", "boot-two")
    report = bound.tool().restore(BDF)  # at that address something may be at vfio-pci: not ours
    assert (report.status, bound.kernel.log) == (0, [])
    assert bound.driver_name() == "vfio-pci"
    assert bound.record() is None


def test_another_device_plugged_in_there_is_left_alone(bound: Machine) -> None:
    device = bound.root / bound.device
    device.rename(device.with_name("unplugged"))
    device.mkdir()
    for name in ("class", "driver", "driver_override"):
        (device.with_name("unplugged") / name).rename(device / name)
    report = bound.tool().restore(BDF)
    assert (report.status, bound.kernel.log) == (0, [])
    assert bound.driver_name() == "vfio-pci"
    assert bound.record() is None


def test_unplugged_drive_only_loses_its_record(bound: Machine) -> None:
    (bound.root / f"sys/bus/pci/devices/{BDF}").unlink()
    assert bound.tool().restore().status == 0
    assert (bound.record(), bound.kernel.log) == (None, [])


@pytest.mark.parametrize("end", ["drivers/vfio-pci/unbind", "drivers_probe"])
def test_failed_restore_leaves_it_bound_as_it_was(bound: Machine, end: str) -> None:
    def once() -> None:
        del bound.kernel.faults[end]
        fail()

    bound.kernel.faults[end] = once
    report = bound.tool().restore(BDF)
    assert (report.status, report.fields["rolled_back"]) == (3, True), report.text()
    assert (bound.driver_name(), bound.override()) == ("vfio-pci", "vfio-pci")
    record = bound.record()
    assert record is not None
    assert record["state"] == "bound"
    assert bound.tool().restore(BDF).status == 0
    bound.as_before()


def test_driver_that_does_not_take_it_back_leaves_it_bound(bound: Machine) -> None:
    bound.kernel.probe_gives["nvme"] = None
    report = bound.tool().restore(BDF)
    assert (report.status, report.fields["rolled_back"]) == (3, True)
    assert bound.driver_name() == "vfio-pci"


def test_drive_that_the_kernel_has_again_is_not_taken_once_more(bound: Machine) -> None:
    written = []

    def third() -> None:
        written.append(1)
        if len(written) == 2:  # clearing the override
            fail()

    bound.kernel.faults["driver_override"] = third
    report = bound.tool().restore(BDF)
    assert (report.status, report.fields["rolled_back"]) == (3, False)
    assert (bound.driver_name(), bound.override()) == ("nvme", "nvme")
    assert bound.tool().restore(BDF).status == 0
    bound.as_before()


def test_another_serial_after_restore_is_reported(bound: Machine) -> None:
    bound.kernel.new_serial = "S-OTHER"
    report = bound.tool().restore(BDF)
    assert report.status == 3
    assert "S-OTHER" in report.text()


@pytest.mark.usefixtures("interruptible")
def test_signal_waits_until_the_drive_is_back(bound: Machine) -> None:
    bound.kernel.faults["drivers/vfio-pci/unbind"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        bound.tool().restore(BDF)
    bound.as_before()


def test_restore_needs_root(bound: Machine) -> None:
    bound.kernel.root_user = False
    assert codes(bound.tool().restore(BDF)) == {"not-root"}
    assert bound.kernel.log == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"bdf": 1}', "\0\0\0\0"])
def test_damaged_record_is_refused_not_guessed(bound: Machine, text: str) -> None:
    bound.write(f"run/spdk_kv/bound-{BDF}.json", text)
    for report in (bound.tool().restore(BDF), bound.tool().restore(), bound.bind()):
        assert (report.status, codes(report)) == (2, {"journal"})
    assert bound.kernel.log == []


def test_record_under_another_name_is_refused(bound: Machine) -> None:
    (record,) = Journal(bound.root).records()
    Journal(bound.root).write(replace(record, bdf="0000:02:00.0"))
    path = bound.root / "run/spdk_kv"
    (path / "bound-0000:02:00.0.json").rename(path / f"bound-{BDF}.json")
    assert codes(bound.tool().restore(BDF)) == {"journal"}
