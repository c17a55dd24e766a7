"""The commands that the pages on binding a drive show, as a reader types them, on a drive that is
free and on one that is in use: neither loses a byte, nor does any other drive."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.binding_script import MKFS, driver, node
from lab.conftest import MIB, PATIENCE_S, ROOT, SMALL, Drive, Hardware, Lab, boot

GUIDE = "docs/how-to/spare-drive-for-spdk.md"
PLACES = {
    GUIDE: "## There and back",
    "docs/reference/binding.md": "## In five commands",
}
ADDRESS, SERIAL = "0000:01:00.0", "S5GXNX0R123456"  # those in the text
# What the output of each kind of command says where all went well.
DONE = {
    "status": " free",
    "bind": "dry run, nothing was changed",
    "bind --yes": "is bound to vfio-pci",
    "hugepages": "hugepages of",
    "permissions": "kv",
    "bench": "GiB/s",
    "restore": "is back with the driver nvme",
}


def commands(page: str) -> list[str]:
    """The lines of the shell blocks below the heading, up to the next one, without comments."""
    text = (ROOT / page).read_text().partition(PLACES[page] + "\n")[2]
    text = re.split(r"^#+ ", text, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(block for language, block in blocks if language == "sh").splitlines()
    typed = (line.partition("  #")[0].rstrip() for line in lines)
    return [line for line in typed if line]


def kind(command: str) -> str:
    """Which of DONE a command is."""
    word = command.replace("sudo ", "").split()[1]
    return f"{word} --yes" if "--yes" in command else word


def type_in(lab: Lab, command: str) -> tuple[int | None, str]:
    """Runs a line of the page in the checkout: its status and all that it printed."""
    done = lab.machine.run("sh", "-c", command, timeout_s=PATIENCE_S, cwd=str(ROOT))
    return done.status, done.text()


@pytest.fixture(scope="module")
def shell() -> Iterator[Lab]:
    """A machine with sudo, with the group of the example, and a .venv.

    One of its own: `status` looks into every drive, and of those the other one has many.
    """
    if not (ROOT / ".venv/bin/spdk-kv").exists():
        pytest.skip("scripts/test.sh or scripts/quickstart.sh makes the .venv of the example")
    drives = [Drive("walk", "LAB-WALK", nbytes=64 * MIB), Drive("other", "LAB-OTHER", nbytes=SMALL)]
    with contextmanager(boot)(Hardware(drives)) as lab:
        lab.shell(
            "command -v sudo || { printf '#!/bin/sh\\nexec \"$@\"\\n' >/usr/local/bin/sudo; "
            "chmod 755 /usr/local/bin/sudo; }; getent group kv || groupadd kv"
        )
        yield lab


@pytest.mark.parametrize("page", PLACES)
def test_a_free_drive_goes_there_and_back_and_keeps_every_byte(shell, page):
    address = shell.script("inventory")["LAB-WALK"]["address"]
    before = shell.machine.image_hashes()
    drivers = []
    for command in commands(page):
        mine = command.replace(ADDRESS, address).replace(SERIAL, "LAB-WALK")
        status, said = type_in(shell, mine)
        assert status == 0, f"{mine}: {said}"
        assert DONE[kind(command)] in said, f"{mine}: {said}"
        if kind(command) == "status":
            assert re.search(rf"^{address} +LAB-WALK .* free$", said, re.MULTILINE), said
        drivers.append(driver(shell, address))
        assert shell.machine.image_hashes() == before, mine
    # There after `bind --yes`, back after `restore`.
    assert drivers[:2] == ["nvme", "nvme"]
    assert set(drivers[2:-1]) == {"vfio-pci"}
    assert drivers[-1] == "nvme"


def test_a_drive_in_use_is_not_touched_by_any_of_them(shell):
    """Whoever takes the wrong drive's address, and its serial as well, and reads no answer."""
    disk = node(shell, "LAB-WALK")
    address = shell.script("inventory")["LAB-WALK"]["address"]
    shell.shell(f"set -e; D={disk}; {MKFS}; mount -o ro $D /mnt; sync")
    try:
        before = shell.machine.image_hashes()
        bench = "sudo .venv/bin/spdk-kv bench io --op write --location "
        writes = [
            f"{bench} {location} --i-know-this-destroys {name}"
            for location, name in (
                (f"spdk://{ADDRESS}/1", f"spdk://{ADDRESS}/1"),
                (f"block://{disk}", disk),
                (f"ng://{disk.replace('/nvme', '/ng')}", disk.replace("/nvme", "/ng")),
            )
        ]
        for command in [*commands(GUIDE), *writes]:
            mine = command.replace(ADDRESS, address).replace(SERIAL, "LAB-WALK")
            status, said = type_in(shell, mine)
            # What only looks, or has nothing to do with the drive, may end well.
            assert status != 0 or kind(command) in ("status", "hugepages"), said
            assert "Traceback" not in said
            assert driver(shell, address) == "nvme"
            assert shell.machine.image_hashes() == before, mine
    finally:
        shell.shell(f"umount /mnt; blkdiscard -f {disk}; sync")
