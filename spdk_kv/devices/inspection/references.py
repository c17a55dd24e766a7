"""What will use a drive later: fstab, crypttab, mdadm.conf, boot loaders, resume, EFI entries.

A drive that is idle now may be the one that the next boot needs.
"""

from __future__ import annotations

import fnmatch
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from spdk_kv.devices.inspection.contents import Contents
from spdk_kv.devices.inspection.kernel import Kernel
from spdk_kv.devices.inspection.reasons import Code, Reason
from spdk_kv.devices.inspection.stack import Stack, member_at
from spdk_kv.devices.inspection.strict import Unreadable, optional_text
from spdk_kv.devices.mounts import unescape

_CONFIGURATION = (
    *("etc/fstab", "etc/fstab.d/*", "etc/crypttab"),
    *("etc/mdadm.conf", "etc/mdadm.conf.d/*", "etc/mdadm/mdadm.conf", "etc/mdadm/mdadm.conf.d/*"),
    *("etc/systemd/system/*.mount", "etc/systemd/system/*.swap", "etc/auto.*"),
    *("run/systemd/generator*/*.mount", "run/systemd/generator*/*.swap"),
    *("etc/zfs/zpool.cache", "etc/lvm/devices/*.devices"),
    *("etc/libvirt/qemu/*.xml", "etc/libvirt/storage/*.xml", "etc/pve/qemu-server/*.conf"),
)
_BOOT = (
    *("proc/cmdline", "etc/kernel/cmdline", "etc/default/grub", "etc/default/grub.d/*"),
    *("etc/initramfs-tools/initramfs.conf", "etc/initramfs-tools/conf.d/*"),
    *("etc/dracut.conf", "etc/dracut.conf.d/*", "etc/mkinitcpio.conf"),
    *("boot/grub/grub.cfg", "boot/grub2/grub.cfg", "boot/extlinux/extlinux.conf"),
    *("boot/loader/entries/*.conf", "efi/loader/entries/*.conf"),
)
_DEVICE_PATH = re.compile(r"/dev/[^\s\"'`,;<>()\x00]+")
_LABEL = re.compile(r"""LABEL=(?:"([^"]*)"|'([^']*)'|([^\s,]+))""", re.IGNORECASE)
_KERNEL_DEVICE = re.compile(r"\b(?:root|resume)=(?:(\d+:\d+)|([0-9a-fA-F]{3,8}))(?=\s|$)")
# A shorter ID, such as FAT's, could be part of another; it must stand alone in the text.
_LONG_ID = 16


def check_references(
    root: Path, kernel: Kernel, stack: Stack, serial: str | None, contents: Contents
) -> Iterator[Reason]:
    """Every file that names the drive or what is on it. Raises Unreadable."""
    for code, patterns in ((Code.CONFIGURED, _CONFIGURATION), (Code.SYSTEM, _BOOT)):
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                if not path.is_file():
                    continue
                text = _without_comments(optional_text(path) or "")
                for name in _named(root, kernel, stack, serial, contents, text):
                    yield Reason(code, f"/{path.relative_to(root)} names {name}")
    yield from _check_resume(root, stack)
    yield from _check_efi(root, contents)


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))


def _named(
    root: Path, kernel: Kernel, stack: Stack, serial: str | None, contents: Contents, text: str
) -> list[str]:
    found: dict[str, None] = {}
    for path in _DEVICE_PATH.findall(unescape(text)):
        # A link in /dev/disk/by-id that does not exist now still contains the drive's serial.
        by_id = bool(serial) and path.startswith("/dev/disk/by-id/") and str(serial) in path
        if by_id or _is_member(root, kernel, stack, path):
            found[path] = None
    bare = re.sub(r"[-:]", "", text).lower()  # mdadm and blkid punctuate UUIDs differently
    for known in sorted(contents.ids):
        digits = re.sub(r"[-:]", "", known)
        if len(digits) >= _LONG_ID:
            if digits in bare:
                found[known] = None
        elif re.search(rf"(?<![0-9a-z]){re.escape(known)}(?![0-9a-z])", text.lower()):
            found[known] = None
    for match in _LABEL.finditer(text):
        label = unescape(match[1] or match[2] or match[3] or "")
        if label in contents.labels:
            found[f"LABEL={label}"] = None
    for numbers, packed in _KERNEL_DEVICE.findall(text):
        if name := stack.numbers.get(f"b{numbers or _unpack(packed)}"):
            found[f"{name} by number"] = None
    return list(found)


def _is_member(root: Path, kernel: Kernel, stack: Stack, path: str) -> bool:
    if any(sign in path for sign in "*?["):  # mdadm.conf's DEVICE lines
        return any(fnmatch.fnmatchcase(f"/dev/{name}", path) for name in stack.names)
    return member_at(root, kernel, stack, path) is not None


def _unpack(packed: str) -> str:
    """Decodes "10301" of a kernel command line to major:minor (new_decode_dev, linux/kdev_t.h)."""
    number = int(packed, 16)
    return f"{(number & 0xFFF00) >> 8}:{(number & 0xFF) | ((number >> 12) & 0xFFF00)}"


def _check_resume(root: Path, stack: Stack) -> Iterator[Reason]:
    number = (optional_text(root / "sys/power/resume") or "").strip()
    if name := stack.numbers.get(f"b{number}"):
        yield Reason(Code.SYSTEM, f"/sys/power/resume is {name}")


def _check_efi(root: Path, contents: Contents) -> Iterator[Reason]:
    if not contents.partition_ids:
        return
    for path in sorted((root / "sys/firmware/efi/efivars").glob("*")):
        if not re.match(r"Boot[0-9A-F]{4}-|LoaderDevicePartUUID-", path.name):
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Unreadable(f"{path}: {error.strerror}") from error
        for known in sorted(contents.partition_ids):
            if _in_variable(known, data):
                name = path.name.partition("-")[0]
                yield Reason(Code.SYSTEM, f"the firmware's {name} names {known}")


def _in_variable(known: str, data: bytes) -> bool:
    # UEFI 2.10, 10.3.5.1: a device path holds the GUID in binary. systemd-boot writes it as text.
    if known.encode("utf-16-le") in data.lower():
        return True
    try:
        return uuid.UUID(known).bytes_le in data
    except ValueError:  # not a GUID: the ID of an MBR partition
        return False
