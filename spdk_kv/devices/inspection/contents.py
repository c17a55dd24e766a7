"""What is on a drive: signatures, names by which other things refer to it, and data of any kind.

It reads the drive, so it is only used on drives that nothing else uses.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.reasons import Code, Reason
from spdk_kv.devices.inspection.stack import Disk, Stack
from spdk_kv.devices.inspection.strict import Unreadable
from spdk_kv.units import KIB, MIB, format_nbytes

_ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})")
_EFI_TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system partition",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "extended boot partition",
    "0xef": "EFI system partition",
    "0xea": "extended boot partition",
}

# ZFS on-disk format: four labels of 256 KiB, two at each end. Each consists of 128 KiB whose last
# 40 bytes are a checksum with this magic, and 128 KiB of uberblocks.
_ZFS_LABEL_NBYTES = 256 * KIB
_ZFS_UBERBLOCK = 0x00BAB10C
_ZFS_CHECKSUM = 0x0210DA7AB10C7A11

_OWN_MAGIC = b"spdk_kv\0"  # as in placement/superblock.py, which this floor may not import

# A drive without a signature is read in full at both ends, and in between at this many places,
# which finds data that covers a thousandth of the drive or more with near certainty.
_END_NBYTES = 4 * MIB
_SAMPLES = 8192
_SAMPLE_NBYTES = 4 * KIB


@dataclass
class Contents:
    """What was found on a drive.

    Attributes:
        ids: UUIDs and the like, in lower case.
        labels: filesystem and partition labels.
        partition_ids: those of ``ids`` that are partition UUIDs.
        boot: reasons because of partitions that a boot needs.
        findings: what would be lost, as reasons.
        kinds: the same in one word each, such as ``ext4`` or ``data``.
        note: how much of a drive that seems empty was read.
    """

    ids: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    partition_ids: set[str] = field(default_factory=set)
    boot: list[Reason] = field(default_factory=list)
    findings: list[Reason] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    note: str = ""


def read_contents(root: Path, kernel: Kernel, stack: Stack) -> Contents:
    """Reads every disk of ``stack``. Raises Unreadable, OSError, ToolMissing."""
    contents = Contents()
    for disk in stack.disks:
        if disk.number is None or disk.nbytes == 0:
            continue  # the verdict refuses it as not inspectable
        for node in disk.nodes:
            _add_signatures(root, kernel, node, contents)
            _add_names(root, kernel, node, contents)
            _add_zfs(root, node, contents)
    if not contents.findings:
        for disk in stack.disks:
            _add_data(root, disk, contents)
    return contents


def _at(root: Path, node: str) -> Path:
    return root / node.lstrip("/")


def _find(contents: Contents, code: Code, kind: str, found: str) -> None:
    contents.findings.append(Reason(code, found))
    contents.kinds.add(kind)


def _add_signatures(root: Path, kernel: Kernel, node: str, contents: Contents) -> None:
    # --no-act is for readers of this line; without --all wipefs only lists anyway.
    done = kernel.run(["wipefs", "--no-act", "--json", str(_at(root, node))])
    if done.status != 0:
        raise Unreadable(f"wipefs on {node}: exit status {done.status}: {done.error.strip()}")
    try:
        signatures = json.loads(done.output)["signatures"] if done.output.strip() else []
        for signature in signatures:
            kind = str(signature["type"])
            shown = " ".join(
                f"{name.upper()}={signature[name]}"
                for name in ("label", "uuid")
                if signature.get(name)
            )
            _find(
                contents,
                Code.SIGNATURE,
                kind,
                f"{node}: {kind} at byte {int(signature['offset'], 16)} {shown}".rstrip(),
            )
    except (ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"wipefs on {node}: unexpected answer: {error!r}") from error


def _add_names(root: Path, kernel: Kernel, node: str, contents: Contents) -> None:
    """Adds UUIDs and labels, by which other things may refer to the drive."""
    done = kernel.run(["blkid", "--probe", "--output", "udev", str(_at(root, node))])
    # Status 2 is "nothing found". It also means "cannot open", but wipefs has just read the node.
    if done.status not in (0, 2):
        raise Unreadable(f"blkid on {node}: exit status {done.status}: {done.error.strip()}")
    for line in done.output.split("\n"):
        name, _, value = line.partition("=")
        value = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), value.strip())
        if not value:
            continue
        if name in ("ID_PART_ENTRY_TYPE",):
            if kind := _EFI_TYPES.get(value.lower()):
                contents.boot.append(Reason(Code.SYSTEM, f"{node} is an {kind}"))
        elif "UUID" in name:
            contents.ids.add(value.lower())
            if name == "ID_PART_ENTRY_UUID":
                contents.partition_ids.add(value.lower())
        elif "LABEL" in name or name == "ID_PART_ENTRY_NAME":
            contents.labels.add(value)


def _add_zfs(root: Path, node: str, contents: Contents) -> None:
    fd = os.open(_at(root, node), os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        labels = size // _ZFS_LABEL_NBYTES * _ZFS_LABEL_NBYTES  # the end is rounded down
        for start in (0, 1, labels // _ZFS_LABEL_NBYTES - 2, labels // _ZFS_LABEL_NBYTES - 1):
            offset = start * _ZFS_LABEL_NBYTES
            if offset >= 0 and _is_zfs_label(os.pread(fd, _ZFS_LABEL_NBYTES, offset)):
                _find(contents, Code.SIGNATURE, "zfs", f"{node}: ZFS label at byte {offset}")
                return
    finally:
        os.close(fd)


def _is_zfs_label(label: bytes) -> bool:
    if len(label) < _ZFS_LABEL_NBYTES:
        return False
    middle = _ZFS_LABEL_NBYTES // 2
    for order in "<>":
        if struct.unpack_from(f"{order}Q", label, middle - 40)[0] == _ZFS_CHECKSUM:
            return True
        # Uberblocks are 1 KiB apart, or more on drives with larger sectors.
        for offset in range(middle, _ZFS_LABEL_NBYTES, KIB):
            if struct.unpack_from(f"{order}Q", label, offset)[0] == _ZFS_UBERBLOCK:
                return True
    return False


def _add_data(root: Path, disk: Disk, contents: Contents) -> None:
    node = f"/dev/{disk.name}"
    if disk.number is None or disk.nbytes == 0:
        return
    fd = os.open(_at(root, node), os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The samples are far apart, so read-ahead would be wasted.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        read_nbytes = 0
        for offset, nbytes in _places(disk.nbytes):
            block = os.pread(fd, nbytes, offset)
            if len(block) != nbytes:
                raise Unreadable(f"{node}: {len(block)} of {nbytes} bytes at byte {offset}")
            read_nbytes += nbytes
            if block != bytes(nbytes):
                first = offset + len(block) - len(block.lstrip(b"\0"))
                own = offset == 0 and block.startswith(_OWN_MAGIC)
                kind = "spdk_kv" if own else "data"
                what = "a store of spdk_kv" if own else "data of no known kind"
                _find(contents, Code.DATA, kind, f"{node}: {what} at byte {first}")
                return
    finally:
        os.close(fd)
    contents.note = (
        f"{node}: no signature; {format_nbytes(read_nbytes)} of {format_nbytes(disk.nbytes)} were "
        "read, spread over all of it, and are zero"
    )


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Places to read in ``size`` bytes, as (offset, nbytes): both ends first, all if small."""
    ends = min(size, _END_NBYTES)
    if size <= 2 * _END_NBYTES + _SAMPLES * _SAMPLE_NBYTES:
        yield from ((start, min(MIB, size - start)) for start in range(0, size, MIB))
        return
    for start in (0, size - ends):
        yield from ((start + step, MIB) for step in range(0, ends, MIB))
    spacing = (size - 2 * ends) // _SAMPLES
    for index in range(_SAMPLES):
        offset = ends + index * spacing
        yield offset - offset % _SAMPLE_NBYTES, _SAMPLE_NBYTES
