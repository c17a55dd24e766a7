"""Bindings that outlast a boot: a list of serials, and a systemd unit that binds them again.

Drives are listed by serial because addresses change as cards are added. They are bound by the same
command with the same checks because a drive may have another use by then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from spdk_kv.binding.journal import replace_file, sync_folder
from spdk_kv.devices.inspection import Code, refuse

_LIST = "etc/spdk_kv/persist.json"
_UNIT = "etc/systemd/system/spdk-kv-vfio.service"
_WANTS = "etc/systemd/system/multi-user.target.wants/spdk-kv-vfio.service"
_UNIT_TEXT = """\
# Written by spdk_kv's setup_vfio (bind --persist); restore removes it.
[Unit]
Description=Take NVMe drives for spdk_kv that were bound with --persist
After=local-fs.target swap.target
ConditionPathExists=/etc/spdk_kv/persist.json

[Service]
Type=oneshot
ExecStart={command} rebind

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Entry:
    """One drive to bind at every boot.

    Attributes:
        serial: its serial.
        kinds: kinds of contents that the user consented to.
        group: the group that `permissions` was given, or None.
    """

    serial: str
    kinds: tuple[str, ...]
    group: str | None = None


class Persistence:
    """The list and the unit.

    Args:
        root: the folder that stands for ``/``.
        program: the absolute command line that runs this tool, without a subcommand.
        package: the package's folder, which that program imports.
    """

    def __init__(self, root: Path, program: Sequence[str], package: Path) -> None:
        self._root = root
        self._program = program
        self._package = package
        self._list = root / _LIST

    def check(self) -> None:
        """Raises Refused unless it is safe for root to run this tool at boot."""
        self.entries()
        if not (self._root / "run/systemd/system").is_dir():
            raise refuse(Code.NOT_POSSIBLE, "--persist needs systemd, which is not running")
        for path in self._program_files():
            writer = _writable_by_others(path)
            if writer:
                found = f"--persist would make root run {path}, which {writer}; "
                found += "install it where only root can write"
                raise refuse(Code.NOT_POSSIBLE, found)

    def _program_files(self) -> Iterator[Path]:
        named = [Path(word) for word in self._program if word.startswith("/")]
        for path in (*named, self._package):
            yield from (path, *path.parents)
            resolved = path.resolve()
            yield from (resolved, *resolved.parents)
        yield from self._package.rglob("*.py")

    def entries(self) -> list[Entry]:
        """The drives to bind at boot. Raises Refused if the list cannot be trusted."""
        try:
            found = os.stat(self._list)
            text = self._list.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refuse(Code.JOURNAL, f"{self._list}: {error.strerror}") from error
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise refuse(Code.JOURNAL, f"{self._list} is writable by others than root")
        try:
            return [
                Entry(str(drive["serial"]), tuple(map(str, drive["kinds"])), drive.get("group"))
                for drive in json.loads(text)["drives"]
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise refuse(Code.JOURNAL, f"{self._list}: {error!r}") from error

    def add(self, serial: str, kinds: set[str]) -> None:
        """Adds the drive to the list, and installs the unit. Raises OSError, Refused."""
        others = [entry for entry in self.entries() if entry.serial != serial]
        unit, wants = self._root / _UNIT, self._root / _WANTS
        command = " ".join(_quoted(word) for word in self._program)
        try:
            replace_file(unit, _UNIT_TEXT.format(command=command), 0o644)
            wants.parent.mkdir(parents=True, exist_ok=True)
            if not wants.is_symlink():
                wants.symlink_to(f"../{unit.name}")
            sync_folder(wants.parent)
            # Comes last: the unit does nothing to the drive until the list names it.
            self._write([*others, Entry(serial, tuple(sorted(kinds)))])
        except OSError:
            if not others:
                self._remove_unit()
            raise

    def _remove_unit(self) -> None:
        (self._root / _WANTS).unlink(missing_ok=True)
        (self._root / _UNIT).unlink(missing_ok=True)

    def set_group(self, serial: str, group: str) -> bool:
        """Gives ``group`` access at every boot. Returns whether the drive is on the list."""
        entries = self.entries()
        if all(entry.serial != serial for entry in entries):
            return False
        self._write([replace(e, group=group) if e.serial == serial else e for e in entries])
        return True

    def remove(self, serial: str) -> bool:
        """Removes the drive, and with the last one the unit. Returns whether it was listed."""
        entries = self.entries()
        others = [entry for entry in entries if entry.serial != serial]
        if len(others) == len(entries):
            return False
        self._write(others)
        if not others:
            self._remove_unit()
            self._list.unlink()
        return True

    def _write(self, entries: Sequence[Entry]) -> None:
        self._list.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        drives = [asdict(entry) for entry in entries]
        replace_file(self._list, json.dumps({"version": 1, "drives": drives}, indent=1), 0o600)


def _writable_by_others(path: Path) -> str | None:
    found = os.lstat(path)
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to user {found.st_uid}"
    # The mode of a link means nothing.
    if not path.is_symlink() and found.st_mode & 0o022:
        return "is writable by others than root"
    return None


def _quoted(word: str) -> str:
    # systemd.service(5), "Command lines": systemd expands % and $.
    for sign, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(sign, escaped)
    return f'"{word}"'
