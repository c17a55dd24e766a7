"""Engine `ng`: NVMe commands by io_uring to a generic node, on a drive that the kernel keeps."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from
from typing import Any

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import DISCARD, READ, Queue, Transfer
from spdk_kv.devices.inspection import (
    Code,
    Kernel,
    Sightings,
    Unreadable,
    check_kernel_use,
    claim,
    read_namespace,
)
from spdk_kv.engines.base import Engine, QueueOptions, block_geometry
from spdk_kv.engines.failures import op_name
from spdk_kv.engines.nvme_status import is_nvme_status, nvme_error
from spdk_kv.engines.uring import LONE_ENTRIES, ring_refusal
from spdk_kv.errors import DeviceGone, EngineUnavailable, StoreLocked, device_error, file_error

OLDEST_KERNEL = "5.19"
"""IORING_OP_URING_CMD and rings with entries of twice the size (IORING_SETUP_SQE128,
IORING_SETUP_CQE32), which NVMe commands need, came with Linux 5.19."""

_NODE = re.compile(r"ng\d+n\d+")
_ROOT = Path("/")
# CNS of an Identify command: what is asked for (NVMe Base 2.0, figure 273).
_IDENTIFY_NAMESPACE, _IDENTIFY_CONTROLLER = 0, 1
_PAGE_NBYTES = 4096
# A command has the number of its blocks in 16 bits, counted from 0 (NVM Command Set 1.0, figure
# 47): the limit of drives that have none of their own.
_MOST_BLOCKS = 1 << 16
# A DMA address has whole dwords; kernels before 6.0 copy what is not aligned to a sector.
_OLD_ALIGN_NBYTES = 512
# A controller in these states is not coming back.
_LOST = ("dead", "deleting", "deleting (no IO)")
_PERMISSION = (
    "NVMe commands are root's (CAP_SYS_ADMIN) before Linux 6.2; from then on whoever may write "
    "{node} may send them, and has to be able to read {disk} too: chgrp and chmod both, or a udev "
    "rule"
)


def why_unavailable() -> tuple[str, str] | None:
    """(what is missing, what mends it), or None where this kernel takes NVMe commands by
    io_uring. Whether there is a drive, and whether this user may, shows when one is opened."""
    try:
        from spdk_kv._native.engines.ng import NgBackend
    except ImportError as missing:
        return (
            f"built without liburing ({missing})",
            "apt install liburing-dev pkg-config, then reinstall spdk_kv",
        )
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        NgBackend(null, 4, 1, 512).close()
    except OSError as refused:
        return _ring_refusal(refused)
    finally:
        os.close(null)
    return None


def _ring_refusal(refused: OSError) -> tuple[str, str]:
    if refused.errno in (errno.EINVAL, errno.ENOSYS):
        return (
            f"Linux {os.uname().release} takes no NVMe commands by io_uring",
            f"Linux {OLDEST_KERNEL} or newer; until then block:///dev/nvmeXnY",
        )
    return ring_refusal(refused)


@dataclass(frozen=True)
class Namespace:
    """What Identify answers, in bytes. ``max_transfer_nbytes``: 0 if the drive has no limit."""

    nsid: int
    serial: str
    model: str
    firmware: str
    nguid: str
    eui64: str
    nbytes: int
    block_nbytes: int
    metadata_nbytes: int
    protection: int
    max_transfer_nbytes: int
    volatile_write_cache: bool
    deallocate: bool


def parse_identify(nsid: int, namespace: bytes, controller: bytes) -> Namespace:
    """From Identify's two answers (NVM Command Set 1.0, figure 97; NVMe Base 2.0, figure 275)."""
    formats, selected = namespace[25] + 1, namespace[26]
    number = selected & 0xF
    if formats > 16:
        number |= selected >> 1 & 0x30
    (size,) = unpack_from("<Q", namespace, 0)
    metadata_nbytes, block_shift = unpack_from("<HB", namespace, 128 + 4 * number)
    limit, (optional,) = controller[77], unpack_from("<H", controller, 520)
    nguid, eui64 = namespace[104:120], namespace[120:128]
    return Namespace(
        nsid=nsid,
        serial=_text(controller[4:24]),
        model=_text(controller[24:64]),
        firmware=_text(controller[64:72]),
        nguid=nguid.hex() if any(nguid) else "",
        eui64=eui64.hex() if any(eui64) else "",
        nbytes=size << block_shift,
        block_nbytes=1 << block_shift,
        metadata_nbytes=metadata_nbytes,
        protection=namespace[29] & 7,
        # In the controller's smallest page, which is 4096 bytes on all that Linux drives on x86.
        max_transfer_nbytes=_PAGE_NBYTES << limit if limit else 0,
        volatile_write_cache=bool(controller[525] & 1),
        deallocate=bool(optional & 1 << 2),
    )


def _text(field: bytes) -> str:
    return field.decode("ascii", "replace").strip(" \0")


@dataclass(frozen=True)
class Limits:
    """What one command may carry through this kernel, from its queue's limits in sysfs."""

    nbytes: int
    align_nbytes: int


def read_limits(disk: str, root: Path = _ROOT) -> Limits:
    """Those of the disk ``disk`` (nvme0n1). DeviceGone where it is not there any more.

    The kernel splits reads and writes of files, but not passthrough: more pages than the queue
    has segments would be refused when they do not happen to lie beside each other.
    """
    queue = root / "sys/class/block" / disk / "queue"
    try:
        most = int((queue / "max_hw_sectors_kb").read_text()) << 10
        segments = int((queue / "max_segments").read_text())
    except OSError as missing:
        raise DeviceGone(f"/dev/{disk} is gone ({missing})") from missing
    try:
        align_nbytes = max(4, int((queue / "dma_alignment").read_text()) + 1)
    except OSError:
        align_nbytes = _OLD_ALIGN_NBYTES
    # One more segment where the memory begins inside a page.
    return Limits(min(most, max(1, segments - 1) * _PAGE_NBYTES), align_nbytes)


def largest_command(found: Namespace, limits: Limits) -> int:
    """Bytes that one read or write may carry to the namespace ``found``."""
    most = min(limits.nbytes, _MOST_BLOCKS * found.block_nbytes)
    return min(most, found.max_transfer_nbytes or most)


class NgEngine(Engine):
    """One namespace through its generic node, ``/dev/ngXnY``.

    The kernel guards that node against nobody, so the disk beside it is held exclusively for as
    long as this is open: nothing can be mounted, swapped on or built on it or on a partition.
    ``namespace`` holds the drive's answers to Identify. Raises StoreLocked where the drive is in
    use, EngineUnavailable, DeviceError.
    """

    name = "ng"
    direct = True

    def __init__(self, path: str, options: QueueOptions) -> None:
        super().__init__(path, options)
        if missing := why_unavailable():
            raise EngineUnavailable(f"engine ng: {missing[0]}; mend it with: {missing[1]}")
        from spdk_kv._native.engines.ng import NgBackend

        with ExitStack() as undo:
            self._node, self._disk = _names(path)
            _hold(self._disk, path, undo)
            fd = _open_node(path, self._disk)
            undo.callback(os.close, fd)
            self.namespace = _identify(fd, path, self._disk)
            limits = read_limits(self._disk)
            self._fit(limits)
            try:
                # Room for the depth, and for the wake-up and cancellations beside it.
                entries = 2 * options.depth + 8
                nsid = self.namespace.nsid
                trial = NgBackend(fd, 4, nsid, self.block_nbytes)
                undo.callback(trial.close)
                backend = NgBackend(fd, entries, nsid, self.block_nbytes)
                undo.callback(backend.close)
                lone = NgBackend(fd, LONE_ENTRIES, nsid, self.block_nbytes, True)
                undo.callback(lone.close)
            except OSError as refused:
                reason = _ring_refusal(refused)
                raise EngineUnavailable(
                    f"engine ng: {reason[0]}; mend it with: {reason[1]}"
                ) from refused
            self._try_a_command(trial)
            self._start(backend.backend, (backend, lone), lone.backend)
            self._held = undo.pop_all()

    def _fit(self, limits: Limits) -> None:
        """Block size, alignment and the largest command, a power of two where it is cut."""
        found = self.namespace
        if found.metadata_nbytes or found.protection:
            raise EngineUnavailable(
                f"{self.where} is formatted with {found.metadata_nbytes} bytes of metadata per "
                "block; format it without (nvme format --lbaf)"
            )
        self.block_nbytes = found.block_nbytes
        self.align_nbytes = limits.align_nbytes
        most = largest_command(found, limits)
        if self.segment_nbytes > most:
            self.segment_nbytes = 1 << (most.bit_length() - 1)
        if self.segment_nbytes < max(_PAGE_NBYTES, self.block_nbytes):
            raise EngineUnavailable(f"{self.where} takes only {most} bytes at once")

    def _try_a_command(self, backend: Any) -> None:
        """Reads one block by a queue of its own: only this shows whether the process may send
        commands."""
        segment_nbytes = max(_PAGE_NBYTES, self.block_nbytes)
        memory = Region(3 * segment_nbytes, False)
        queue = Queue(
            backend.backend,
            (backend, memory),
            depth=1,
            segment_nbytes=segment_nbytes,
            block_nbytes=self.block_nbytes,
            align_nbytes=self.align_nbytes,
            slots=[memory.address + n * segment_nbytes for n in (1, 2)],
            pid=os.getpid(),
        )
        transfer = Transfer(queue, READ)
        transfer.keep(memory)
        transfer.add(0, memory.address, self.block_nbytes)
        status = transfer.run(60.0)
        queue.close(30.0)
        if not status or is_nvme_status(status):
            return  # a drive that cannot read its first block is reported when that is read
        if status in (errno.EACCES, errno.EPERM):
            raise EngineUnavailable(f"engine ng: {_permission(self.where, self._disk)}")
        if status == errno.EOPNOTSUPP:
            raise EngineUnavailable(
                f"engine ng: Linux {os.uname().release} takes no NVMe commands by io_uring for "
                f"{self.where}; use block:///dev/{self._disk}"
            )
        raise self.error(transfer)

    @property
    def capacity_nbytes(self) -> int:
        return self.namespace.nbytes

    @property
    def identity(self) -> str:
        """Equal to the spdk engine's, so that a store can move between the two with its drive."""
        found = self.namespace
        names = (found.serial, found.nguid, found.eui64, f"ns{found.nsid}")
        return " ".join(name for name in names if name)

    @property
    def geometry(self) -> str:
        return block_geometry(self.namespace.block_nbytes, self.namespace.nbytes)

    @property
    def gone(self) -> bool:
        """Whether the kernel has lost the drive."""
        try:
            state = Path(f"/sys/class/block/{self._disk}/device/state").read_text().strip()
        except FileNotFoundError:
            # With multipath the disk belongs to a subsystem, which has no state file.
            return not Path(f"/sys/class/nvme-generic/{self._node}").exists()
        except OSError:
            return True
        return state in _LOST

    def error(self, transfer: Transfer) -> Exception:
        offset, nbytes = transfer.failure or (0, 0)
        op = op_name(transfer.op)
        if transfer.status != errno.ETIMEDOUT and self.gone:
            return DeviceGone(
                f"{op} of {nbytes} bytes at offset {offset} failed: {self.where} is gone",
                op=op,
                offset=offset,
                nbytes=nbytes,
                status=errno.ENODEV,
            )
        if not is_nvme_status(transfer.status):
            return super().error(transfer)
        return nvme_error(op, offset, nbytes, transfer.status, self.where, self.block_nbytes)

    def discard(self, offset: int, nbytes: int, timeout_s: float | None = None) -> bool:
        if not self.namespace.deallocate:
            return False
        transfer = self.transfer(DISCARD)
        transfer.add(offset, 0, nbytes)
        self.run(transfer, timeout_s)
        return True

    def _release(self) -> None:
        self._slots = None
        self._held.close()


def _names(path: str) -> tuple[str, str]:
    """The kernel's names of the generic node at ``path`` and of the disk beside it."""
    try:
        found = os.stat(path)
    except OSError as refused:
        raise file_error("open", path, refused) from refused
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    node = os.path.basename(os.path.realpath(f"/sys/dev/char/{number}"))
    if not stat.S_ISCHR(found.st_mode) or not _NODE.fullmatch(node):
        hint = f"; for a disk or partition write block://{path}" * stat.S_ISBLK(found.st_mode)
        raise EngineUnavailable(
            f"{path} is not the generic node of an NVMe namespace (ls /dev/ng*){hint}"
        )
    disk = node.replace("ng", "nvme")
    if not Path("/sys/class/block", disk).exists():
        raise EngineUnavailable(f"{path}: the kernel has no disk /dev/{disk} beside it to hold")
    return node, disk


def _hold(disk: str, path: str, undo: ExitStack) -> None:
    """Claims the disk, then checks that nobody used it before. StoreLocked where somebody does."""
    kernel = Kernel()
    try:
        stack = read_namespace(_ROOT, disk)
        claims = undo.enter_context(claim(_ROOT, kernel, stack.disks))
        users = _users(kernel, disk)
    except (Unreadable, OSError) as failed:
        raise EngineUnavailable(f"{path}: its users cannot be determined: {failed}") from failed
    if users:
        raise StoreLocked(f"{path} is in use: {'; '.join(users)}")
    if not claims.refusals:
        return
    found = claims.refusals[0].found
    if claims.refusals[0].code == Code.OPEN_EXCLUSIVE:
        raise StoreLocked(f"{path} is in use: {found}; see `lsblk` and `fuser -v /dev/{disk}`")
    raise EngineUnavailable(
        f"{path}: the disk beside it cannot be held ({found}); {_permission(path, disk)}"
    )


def _users(kernel: Kernel, disk: str) -> list[str]:
    """What the kernel uses the disk for. An ordinary user cannot see all of that; for the rest the
    claim alone has to do."""
    found = []
    try:
        seen = Sightings(_ROOT, kernel)
        for reason in check_kernel_use(_ROOT, kernel, read_namespace(_ROOT, disk), seen):
            found.append(f"{reason.code.value}: {reason.found}")
    except (Unreadable, OSError):
        if kernel.is_root():
            raise
    return found


def _open_node(path: str, disk: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as refused:
        if refused.errno in (errno.EACCES, errno.EPERM):
            raise EngineUnavailable(f"engine ng: {_permission(path, disk)}") from refused
        raise file_error("open", path, refused) from refused


def _identify(fd: int, path: str, disk: str) -> Namespace:
    from spdk_kv._native.engines.ng import identify, namespace_id

    try:
        nsid = namespace_id(fd)
        return parse_identify(
            nsid,
            identify(fd, nsid, _IDENTIFY_NAMESPACE),
            identify(fd, 0, _IDENTIFY_CONTROLLER),
        )
    except OSError as refused:
        if refused.errno in (errno.EACCES, errno.EPERM):
            raise EngineUnavailable(f"engine ng: {_permission(path, disk)}") from refused
        raise device_error("identify", 0, 0, refused.errno or 0, path) from refused


def _permission(path: str, disk: str) -> str:
    return _PERMISSION.format(node=path, disk=f"/dev/{disk}")
