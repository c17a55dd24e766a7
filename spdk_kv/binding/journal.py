"""The record of what this tool has bound and not given back: a small file per drive.

Only root may read it. It is in /run, because a binding ends with the boot. Where /run outlives the
boot, the record's boot ID shows that it is stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spdk_kv.devices.inspection import Code, refuse

FOLDER = "run/spdk_kv"
BINDING, BOUND, RESTORING = "binding", "bound", "restoring"
_STATES = (BINDING, BOUND, RESTORING)
_VERSION = 1
_RECORD = re.compile(r"bound-(.+)\.json")


@dataclass(frozen=True)
class Record:
    """One drive that was taken, or is about to be.

    Attributes:
        bdf: PCI address.
        former_driver, former_override: what restore puts back.
        group: IOMMU group.
        inode: of the function's sysfs directory, which tells it from a drive plugged in later.
        state: "binding", "bound" or "restoring".
    """

    bdf: str
    serial: str
    model: str | None
    former_driver: str
    former_override: str | None
    group: str
    boot_id: str
    inode: int
    state: str
    version: int = _VERSION


def read_boot_id(root: Path) -> str:
    """The kernel's name for this boot."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as error:
        raise refuse(Code.UNREADABLE, str(error)) from error


class Journal:
    """The folder of records. Every change is on the medium when the call returns."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, checks that only root has access, and keeps other runs out.

        Raises Refused, with the code ``busy`` while another run is under way.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_folder()
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._folder / "lock", flags, 0o600)
        except OSError as error:
            raise refuse(Code.JOURNAL, f"{self._folder}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise refuse(Code.BUSY, "another run of this tool is under way") from error
            yield
        finally:
            os.close(fd)

    def _check_folder(self) -> None:
        found = os.lstat(self._folder)
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not private or found.st_uid != os.geteuid():
            found_as = f"{stat.filemode(found.st_mode)}, owner {found.st_uid}"
            message = f"{self._folder} is accessible to others than root: {found_as}"
            raise refuse(Code.JOURNAL, message)

    def records(self) -> list[Record]:
        """Every record, by BDF. Raises Refused if one cannot be read or trusted."""
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refuse(Code.JOURNAL, f"{self._folder}: {error.strerror}") from error
        self._check_folder()
        return [self._parse(name, match[1]) for name in names if (match := _RECORD.fullmatch(name))]

    def _parse(self, name: str, bdf: str) -> Record:
        path = self._folder / name
        known = {f.name: f.type for f in fields(Record)}
        try:
            values = json.loads(path.read_bytes())
            record = Record(**values)
            for field, kind in known.items():
                accepted = {"str": str, "int": int, "str | None": (str, type(None))}[str(kind)]
                if not isinstance(values[field], accepted):  # type: ignore[arg-type]
                    raise ValueError(f"{field} is {values[field]!r}")
            if record.bdf != bdf or record.state not in _STATES or record.version != _VERSION:
                raise ValueError("its fields contradict each other")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise refuse(Code.JOURNAL, f"{path}: {error}") from error
        return record

    def write(self, record: Record) -> None:
        """Writes ``record``, replacing that of the same drive. Raises OSError."""
        self._replace(f"bound-{record.bdf}.json", asdict(record))

    def remove(self, bdf: str) -> None:
        """Removes the record of ``bdf`` and the list of contents shown. Raises OSError."""
        for name in (f"bound-{bdf}.json", f"shown-{bdf}.json"):
            (self._folder / name).unlink(missing_ok=True)
        self._sync_folder()

    def write_shown(self, bdf: str, serial: str, boot_id: str, shown: list[str]) -> None:
        """Records which list of contents the user was shown. Raises OSError."""
        values = {"serial": serial, "boot_id": boot_id, "shown": shown}
        self._replace(f"shown-{bdf}.json", values)

    def was_shown(self, bdf: str, serial: str, boot_id: str, shown: list[str]) -> bool:
        """Whether exactly this list was shown for this drive in this boot."""
        try:
            values = json.loads((self._folder / f"shown-{bdf}.json").read_bytes())
        except (OSError, ValueError):
            return False
        return bool(values == {"serial": serial, "boot_id": boot_id, "shown": shown})

    def _replace(self, name: str, values: Mapping[str, Any]) -> None:
        replace_file(self._folder / name, json.dumps(values, indent=1), 0o600)

    def _sync_folder(self) -> None:
        sync_folder(self._folder)


def replace_file(path: Path, text: str, mode: int) -> None:
    """Replaces the file at ``path`` atomically: a crash leaves the old text or the new."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        os.fchmod(fd, mode)  # whatever the umask
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.replace(fresh, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
