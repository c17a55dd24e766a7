"""Who may own a drive, and what is left when its owner is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab.conftest import PATIENCE_S

USER = "nobody"
MIB = 1 << 20


def test_a_killed_owner_leaves_no_memory_behind_and_the_drive_can_be_given_back(lab):
    address = lab.script("inventory")["LAB-KILL"]["address"]
    owner = lab.start("owner", "LAB-KILL")
    lab.await_text(owner, "owned")
    lab.machine.link.signal(owner, 9)
    assert lab.machine.link.wait(owner, PATIENCE_S) == -9
    told = lab.script("after_owner", "LAB-KILL", address)
    assert told == {
        "driver": "vfio-pci",
        "left": [],
        "next_owner_reads_it": True,
        "kernel_reads_it": True,
    }


@pytest.fixture
def granted(lab, request) -> Iterator[dict]:
    """The drive that the test names, on vfio-pci, its node handed to ``USER``."""
    told = lab.script("grant", request.param, USER)
    yield told
    lab.give_back(told["address"])


def as_user(lab, name: str, *arguments: object, memlock_nbytes: int = 1024 * MIB) -> dict:
    """What a script told that ``USER`` ran, with that much memory that may be pinned."""
    limited = ["prlimit", f"--memlock={memlock_nbytes}", "setpriv", f"--reuid={USER}"]
    limited += ["--regid=nogroup", "--clear-groups", "--inh-caps=-all"]
    done = lab.machine.run(
        *limited, *lab.command(name, *arguments), timeout_s=PATIENCE_S, env=lab.env
    )
    assert done.status == 0, done.text()
    return json.loads(done.text("out").splitlines()[-1])


@pytest.mark.parametrize("granted", ["LAB-USER"], indirect=True)
def test_a_user_with_the_group_node_and_memlock_drives_it_and_nobody_else_does(lab, granted):
    told = as_user(lab, "unprivileged", granted["address"])
    assert told == {"kind": "opened", "same": True}
    lab.shell(f"chmod 600 {granted['node']}")
    told = as_user(lab, "unprivileged", granted["address"])
    assert told["kind"] in ("EngineUnavailable", "DeviceGone"), told


@pytest.mark.parametrize("granted", ["LAB-LOCK"], indirect=True)
def test_too_little_memory_to_pin_is_said(lab, granted):
    told = as_user(lab, "unprivileged", granted["address"], memlock_nbytes=MIB)
    assert told["kind"] == "EngineUnavailable", told
    assert "memlock" in told["text"]
