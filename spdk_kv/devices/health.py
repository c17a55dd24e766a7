"""The health log of an NVMe drive that the kernel drives: how worn it is.

NVM Express Base Specification 2.0, section 5.16.1.3 (SMART / Health Information, log 02h).
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

from spdk_kv.devices.sysfs import entries

_CONTROLLER = re.compile(r"/nvme/(nvme\d+)/")
_SUBSYSTEM = re.compile(r".*/nvme-subsystem/[^/]+")
_NAME = re.compile(r"nvme\d+")

_GET_LOG_PAGE = 0x02
_HEALTH_LOG = 0x02
_LOG_NBYTES = 512
_ALL_NAMESPACES = 0xFFFFFFFF
_TIMEOUT_MS = 2000
# Data units are counted in thousands of 512 bytes.
_UNIT_NBYTES = 512_000


@dataclass(frozen=True)
class Health:
    """What a drive says of its wear.

    Attributes:
        used: Share of the life that its maker promises; may pass 1.
        spare: Share of the spare blocks that is left.
        written_nbytes, read_nbytes: Since it was made, by the host.
        power_on_hours: Since it was made.
        media_errors: What it could not read or correct.
        is_critical: Whether it warns: spare low, too hot, unreliable, or read-only.
    """

    used: float
    spare: float
    written_nbytes: int
    read_nbytes: int
    power_on_hours: int
    media_errors: int
    is_critical: bool


class _Command(ctypes.Structure):
    """struct nvme_passthru_cmd of linux/nvme_ioctl.h."""

    _fields_ = (
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    )


# _IOWR('N', 0x41, struct nvme_passthru_cmd)
_ADMIN_COMMAND = 0xC0004E41 | ctypes.sizeof(_Command) << 16


def read_health(path: str | os.PathLike[str], root: Path = Path("/")) -> Health | None:
    """The health of the NVMe drive that the file, folder or device at ``path`` is on.

    None where it is on something else, or this process may not ask (root may). Blocks on the drive,
    for seconds at most where it does not answer.
    """
    controller = controller_of(path, root)
    if controller is None:
        return None
    log = ctypes.create_string_buffer(_LOG_NBYTES)
    command = _Command(
        opcode=_GET_LOG_PAGE,
        nsid=_ALL_NAMESPACES,
        addr=ctypes.addressof(log),
        data_len=_LOG_NBYTES,
        # Numbers of dwords are 0-based.
        cdw10=(_LOG_NBYTES // 4 - 1) << 16 | _HEALTH_LOG,
        timeout_ms=_TIMEOUT_MS,
    )
    try:
        node = os.open(root / "dev" / controller, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = ioctl(node, _ADMIN_COMMAND, command)
        finally:
            os.close(node)
    except OSError:
        return None
    return None if status else parse_health(log.raw)


def controller_of(path: str | os.PathLike[str], root: Path = Path("/")) -> str | None:
    """The name of the controller, like nvme0, of the namespace that ``path`` is on; None where it
    is on no NVMe drive, or on several by way of dm or md."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    kind = "char" if stat.S_ISCHR(found.st_mode) else "block"
    device = found.st_rdev or found.st_dev
    link = root / f"sys/dev/{kind}/{os.major(device)}:{os.minor(device)}"
    where = os.path.realpath(link)
    if match := _CONTROLLER.search(where):
        return match[1]
    # With native multipath a namespace hangs below its subsystem, beside its controllers.
    if match := _SUBSYSTEM.match(where):
        for name in entries(Path(match[0])):
            if _NAME.fullmatch(name):
                return name
    return None


def parse_health(log: bytes) -> Health:
    """The fields of a health log of 512 bytes."""

    def count(begin: int) -> int:
        return int.from_bytes(log[begin : begin + 16], "little")

    return Health(
        used=log[5] / 100,
        spare=log[3] / 100,
        written_nbytes=count(48) * _UNIT_NBYTES,
        read_nbytes=count(32) * _UNIT_NBYTES,
        power_on_hours=count(128),
        media_errors=count(160),
        is_critical=log[0] != 0,
    )
