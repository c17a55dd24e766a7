"""NVMe status codes by their names (NVM Express Base Specification 2.0, section 3.3.3.2.1)."""

from __future__ import annotations

from spdk_kv.errors import CorruptionError, DeviceError, DeviceGone, DeviceTimeout, SpdkKvError

# Set in a transfer's status where it is not an errno (SKV_NVME_STATUS in cython_src/backend.h).
_FLAG = 0x10000

_TYPES = {
    0: "generic command status",
    1: "command specific status",
    2: "media and data integrity errors",
    3: "path related status",
    7: "vendor specific",
}
_GENERIC = {
    0x01: "Invalid Command Opcode",
    0x02: "Invalid Field in Command",
    0x03: "Command ID Conflict",
    0x04: "Data Transfer Error",
    0x05: "Commands Aborted due to Power Loss Notification",
    0x06: "Internal Error",
    0x07: "Command Abort Requested",
    0x08: "Command Aborted due to SQ Deletion",
    0x09: "Command Aborted due to Failed Fused Command",
    0x0A: "Command Aborted due to Missing Fused Command",
    0x0B: "Invalid Namespace or Format",
    0x0C: "Command Sequence Error",
    0x13: "PRP Offset Invalid",
    0x15: "Operation Denied",
    0x1C: "Sanitize Failed",
    0x1D: "Sanitize In Progress",
    0x20: "Namespace is Write Protected",
    0x21: "Command Interrupted",
    0x22: "Transient Transport Error",
    0x80: "LBA Out of Range",
    0x81: "Capacity Exceeded",
    0x82: "Namespace Not Ready",
    0x83: "Reservation Conflict",
    0x84: "Format In Progress",
}
_SPECIFIC = {
    0x80: "Conflicting Attributes",
    0x81: "Invalid Protection Information",
    0x82: "Attempted Write to Read Only Range",
    0x83: "Command Size Limit Exceeded",
}
_MEDIA = {
    0x80: "Write Fault",
    0x81: "Unrecovered Read Error",
    0x82: "End-to-end Guard Check Error",
    0x83: "End-to-end Application Tag Check Error",
    0x84: "End-to-end Reference Tag Check Error",
    0x85: "Compare Failure",
    0x86: "Access Denied",
    0x87: "Deallocated or Unwritten Logical Block",
    0x88: "End-to-end Storage Tag Check Error",
}
_PATH = {
    0x00: "Internal Path Error",
    0x01: "Asymmetric Access Persistent Loss",
    0x02: "Asymmetric Access Inaccessible",
    0x03: "Asymmetric Access Transition",
    0x60: "Controller Pathing Error",
    0x70: "Host Pathing Error",
    0x71: "Command Aborted By Host",
}
_NAMES = {0: _GENERIC, 1: _SPECIFIC, 2: _MEDIA, 3: _PATH}
# Guard, application, reference and storage tag: the bytes are not what was written.
_PROTECTION = {0x82, 0x83, 0x84, 0x88}
_ABORTED = {(0, 0x07), (3, 0x71)}
_LOST = {(0, 0x08), (3, 0x60), (3, 0x70)}


def is_nvme_status(status: int) -> bool:
    """Whether a transfer's status is a status code of the drive, and not an errno."""
    return bool(status & _FLAG)


def status_name(status: int) -> str:
    """``Unrecovered Read Error (media and data integrity errors, 02h/81h)``."""
    kind, code = status >> 8 & 7, status & 0xFF
    name = _NAMES.get(kind, {}).get(code, "unknown status")
    return f"{name} ({_TYPES.get(kind, 'reserved type')}, {kind:02x}h/{code:02x}h)"


def nvme_error(
    op: str, offset: int, nbytes: int, status: int, where: str, block_nbytes: int
) -> SpdkKvError:
    """The typed error for a command that the drive ended with ``status``."""
    kind, code = status >> 8 & 7, status & 0xFF
    message = (
        f"{op} of {nbytes} bytes at LBA {offset // block_nbytes} (offset {offset}) of {where} "
        f"failed: {status_name(status)}"
    )
    if kind == 2 and code in _PROTECTION:
        return CorruptionError(message)
    fields = {"op": op, "offset": offset, "nbytes": nbytes, "status": status & ~_FLAG}
    if (kind, code) in _ABORTED:
        return DeviceTimeout(f"{message}: aborted, or the controller was reset", **fields)  # type: ignore[arg-type]
    if (kind, code) in _LOST:
        return DeviceGone(message, **fields)  # type: ignore[arg-type]
    return DeviceError(message, **fields)  # type: ignore[arg-type]
