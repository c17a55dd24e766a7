"""Who may own a drive, and what is left when its owner is killed."""

from __future__ import annotations

import json

USER = "nobody"
MIB = 1 << 20


def test_a_killed_owner_leaves_no_memory_behind_and_the_drive_can_be_given_back(lab):
    address = lab.script("inventory")["LAB-KILL"]["address"]
    owner = lab.start("owner", "LAB-KILL")
    lab.machine.link.wait_text(owner, "owned", 60.0)
    lab.machine.link.signal(owner, 9)
    assert lab.machine.link.wait(owner, 30.0) == -9
    told = lab.script("after_owner", "LAB-KILL", address)
    assert told == {
        "driver": "vfio-pci",
        "left": [],
        "next_owner_reads_it": True,
        "kernel_reads_it": True,
    }


def as_user(lab, name: str, *arguments: object, memlock_nbytes: int = 1024 * MIB) -> dict:
    """What a script told that ``USER`` ran, with that much memory that may be pinned."""
    limited = ["prlimit", f"--memlock={memlock_nbytes}", "setpriv", f"--reuid={USER}"]
    limited += ["--regid=nogroup", "--clear-groups", "--inh-caps=-all"]
    done = lab.machine.run(*limited, *lab.command(name, *arguments), timeout_s=120.0, env=lab.env)
    assert done.status == 0, done.text()
    return json.loads(done.text("out").splitlines()[-1])


def test_a_user_with_the_group_node_and_memlock_drives_it_and_nobody_else_does(lab):
    granted = lab.script("grant", "LAB-USER", USER)
    told = as_user(lab, "unprivileged", granted["address"])
    assert told == {"kind": "opened", "same": True}
    lab.shell(f"chmod 600 {granted['node']}")
    told = as_user(lab, "unprivileged", granted["address"])
    assert told["kind"] in ("EngineUnavailable", "DeviceGone"), told


def test_too_little_memory_to_pin_is_said(lab):
    granted = lab.script("grant", "LAB-LOCK", USER)
    told = as_user(lab, "unprivileged", granted["address"], memlock_nbytes=MIB)
    assert told["kind"] == "EngineUnavailable", told
    assert "memlock" in told["text"]
