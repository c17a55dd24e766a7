"""A drive that goes away while it is read: typed errors at once, nothing that spins or hangs."""

from __future__ import annotations

import json

from lab.conftest import PATIENCE_S


def check(told: dict) -> None:
    assert told["good"] >= 2
    assert [kind for _, kind, _ in told["failures"]] == ["DeviceGone", "DeviceGone"], told
    assert told["again"] == ["DeviceGone"] * 3
    # At once, and not by anybody's deadline; those of these reads are far longer.
    assert told["again_s"] < 60.0
    assert told["gone"]
    # The thread that watches the controller wakes now and then; a poller would use all of it.
    assert told["idle_cpu_s"] < 1.0
    # After 30 s it would have given up.
    assert told["close_s"] < 30.0


def test_a_drive_unplugged_under_load_is_gone_and_is_let_go(lab):
    reading = lab.start("reading", "LAB-PULL")
    lab.await_text(reading, "reading")
    lab.machine.unplug("pull")
    # The kernel asks the drive's owner to let go, and takes it out when it did.
    check(lab.answer(reading))
    lab.machine.wait_unplugged("pull", PATIENCE_S)
    assert "LAB-PULL" not in lab.script("inventory")


def test_a_drive_whose_slot_loses_power_under_load_is_gone(lab):
    # Kept open: Linux before 6.13 waits more than a minute for a card that is not there to be
    # reset, when its owner lets go of it or ends.
    reading = lab.start("reading", "LAB-CUT", "keep")
    lab.await_text(reading, "reading")
    lab.script("cut_power", reading.text().split()[1])
    lab.machine.wait_unplugged("cut", PATIENCE_S)
    lab.await_text(reading, "}\n")
    check(json.loads(reading.text("out").splitlines()[-1]))
