"""How the status that a transfer ended with becomes a typed error."""

from __future__ import annotations

import errno

from spdk_kv._native.transfer import DISCARD, FLUSH, READ, WRITE, Transfer
from spdk_kv.errors import CorruptionError, DeviceError, DeviceTimeout, device_error

_OP_NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", DISCARD: "discard"}
# A transfer's status with this bit set is a link's (SKV_LINK_STATUS in cython_src/gpu_link.h).
_LINK_STATUS = 0x20000


def op_name(op: int) -> str:
    """``read``, ``write``, ``flush`` or ``discard``."""
    return _OP_NAMES[op]


def transfer_error(transfer: Transfer, where: str) -> Exception:
    """The error for a transfer on ``where`` that ended with a status of the loop, the kernel or a
    link."""
    offset, nbytes = transfer.failure or (0, 0)
    op = _OP_NAMES[transfer.op]
    if transfer.status == errno.ENODATA:
        return CorruptionError(
            f"short {op}: {where} ends inside the {nbytes} bytes at offset {offset}; "
            "it was truncated"
        )
    if transfer.status == errno.ETIMEDOUT:
        return DeviceTimeout(
            f"{op}{f' of {transfer.nbytes} bytes' if transfer.nbytes else ''} on {where} "
            "passed its deadline; its memory stays out of use until the drive lets go",
            op=op,
            offset=offset,
            nbytes=transfer.nbytes,
            status=errno.ETIMEDOUT,
        )
    if transfer.status & _LINK_STATUS:
        why = transfer.link.explain(transfer.status & ~_LINK_STATUS)
        return DeviceError(
            f"{op} of {nbytes} bytes at offset {offset} of {where} failed on its way "
            f"{'from' if transfer.op == WRITE else 'to'} the GPU: {why}",
            op=op,
            offset=offset,
            nbytes=nbytes,
            status=transfer.status,
        )
    return device_error(op, offset, nbytes, transfer.status, where)
