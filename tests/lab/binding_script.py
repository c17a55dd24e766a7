"""scripts/setup_vfio.py inside the lab, and what is put on a drive that it must then refuse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lab.conftest import PATIENCE_S, ROOT, Lab

SCRIPT = ROOT / "scripts" / "setup_vfio.py"


@dataclass
class Situation:
    """What the drive $D is brought into by ``make``, and out of by ``undo``; shell, as root.

    ``codes``: what must be among the reasons. ``after``: what must be, once it was undone.
    ``tool``: the program that ``make`` needs.
    """

    make: str
    undo: str
    codes: frozenset[str]
    after: frozenset[str] = frozenset()
    tool: str = "sh"


def situation(make: str, undo: str, *codes: str, after: str = "", tool: str = "sh") -> Situation:
    return Situation(make, undo, frozenset(codes), frozenset(after.split()), tool)


MKFS = "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 $D"
# In these the kernel itself has the drive: engine `ng` must refuse it, too.
KERNELS = {"mounted", "swap", "holder", "loop", "export"}
SITUATIONS = {
    "mounted": situation(f"{MKFS}; mount -o ro $D /mnt", "umount /mnt", "mounted"),
    "mounted where only another process sees it": situation(
        f"{MKFS}; unshare -m --propagation private sh -c 'mount -o ro $D /mnt; sleep 600' "
        "</dev/null >/dev/null 2>&1 & echo $! >/run/holder; sleep 2",
        "pkill -P $(cat /run/holder); kill $(cat /run/holder); sleep 1",
        "mounted",
    ),
    "mounted where no process sees it any more": situation(
        f"{MKFS}; mount $D /mnt; mkdir /mnt/upper /mnt/work /run/over; mount -t overlay "
        "-o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work over /run/over; umount -l /mnt",
        "umount /run/over; rmdir /run/over", "open-exclusive",
    ),
    "mounted as /boot": situation(
        f"{MKFS}; mount -o ro $D /boot", "umount /boot", "mounted", "system"
    ),
    "the root of a process": situation(
        f"{MKFS}; mkdir -p /run/newroot; unshare -m --propagation private sh -c "
        "'mount $D /run/newroot; mkdir -p /run/newroot/old; "
        "cp /bin/busybox /run/newroot/; sync; mount -o remount,ro $D /run/newroot; cd /run/newroot;"
        " pivot_root . old; exec /busybox sleep 600' </dev/null >/dev/null 2>&1 & "
        "echo $! >/run/holder; sleep 3",
        "kill $(cat /run/holder); sleep 1",
        "mounted", "system",
    ),
    "swap": situation("mkswap -q $D; swapon $D", "swapoff $D", "swap"),
    "a filesystem that is not mounted": situation(MKFS, ":", "signature"),
    "partitioned by fdisk": situation(
        "printf 'n\\np\\n1\\n\\n\\nw\\n' | busybox fdisk $D >/dev/null", ":", "signature",
        tool="busybox",
    ),
    "with an EFI partition": situation(
        "printf 'label: gpt\\n,,U\\n' | sfdisk -q $D", ":", "signature", "system", tool="sfdisk"
    ),
    "partitioned": situation("printf 'label: gpt\\n,\\n' | sfdisk -q $D", ":", "signature",
                             tool="sfdisk"),
    "a partition of it is mounted": situation(
        "printf 'label: gpt\\n,\\n' | sfdisk -q $D; mkfs.ext4 -q -F ${D}p1; "
        "mount -o ro ${D}p1 /mnt",
        "umount /mnt", "mounted", tool="sfdisk",
    ),
    "exported by nvmet": situation(
        "modprobe nvmet; mount -t configfs none /sys/kernel/config; "
        "N=/sys/kernel/config/nvmet/subsystems/lab/namespaces/1; mkdir ${N%/*/*} $N; "
        "printf $D >$N/device_path; echo 1 >$N/enable",
        "N=/sys/kernel/config/nvmet/subsystems/lab/namespaces/1; echo 0 >$N/enable; "
        "rmdir $N ${N%/*/*}; umount /sys/kernel/config; modprobe -r nvmet",
        "export",
    ),
    "a volume of LVM": situation(
        "pvcreate -q $D; vgcreate -q labvg $D; lvcreate -q -an -Zn -Wn -l 4 -n v labvg; "
        "vgchange -q -ay labvg; dmsetup ls",
        "vgchange -q -an labvg", "holder", after="signature", tool="lvcreate",
    ),
    "mapped by dm": situation(
        "echo 0 2048 linear $D 0 | dmsetup create labdm", "dmsetup remove labdm", "holder",
        tool="dmsetup",
    ),
    "in md": situation(
        "mdadm --create /dev/md9 --run --force --level=1 --raid-devices=1 --metadata=1.2 $D",
        "mdadm --stop /dev/md9", "holder", after="signature", tool="mdadm",
    ),
    "behind a loop device": situation(
        "modprobe loop; losetup -r $(losetup -f) $D", "losetup -D", "loop"
    ),
    "data without a signature": situation(
        "dd if=/dev/urandom of=$D bs=1M count=1 seek=17 conv=fsync status=none", ":", "data"
    ),
    "open by a process": situation(
        "sleep 600 <$D >/dev/null 2>&1 & echo $! >/run/holder", "kill $(cat /run/holder)", "open"
    ),
    "its generic node is open": situation(
        "sleep 600 </dev/ng${D#/dev/nvme} >/dev/null 2>&1 & echo $! >/run/holder",
        "kill $(cat /run/holder)", "open",
    ),
    "in fstab": situation("echo $D /data ext4 noauto 0 0 >>/etc/fstab", "sed -i '\\#^/dev/nvme#d' "
                          "/etc/fstab", "configured"),
}  # fmt: skip


def setup(lab: Lab, *arguments: object, script: Any = SCRIPT) -> tuple[int, dict[str, Any]]:
    """Runs the script inside, with the system's Python: its exit status and what it said."""
    done = lab.machine.run(
        "/usr/bin/env", "python3", script, *arguments, "--json", timeout_s=PATIENCE_S
    )
    assert done.status in (0, 2, 3), done.text()
    return done.status, json.loads(done.text("out"))


def codes(answer: dict[str, Any]) -> set[str]:
    """The reasons that the script gave."""
    return {reason["code"] for reason in answer["reasons"]}


def node(lab: Lab, serial: str) -> str:
    """The drive's block device inside; waits until the kernel has made it."""
    find = f"grep -ls '^{serial} *$' /sys/class/nvme/nvme*/serial"
    shown = lab.shell(
        f"for i in $(seq 600); do D=$({find}) && D=/dev/$(basename ${{D%/serial}})n1 && "
        "test -b $D && exec echo $D; sleep 0.5; done; exit 1"
    )
    return shown.text().strip()


def driver(lab: Lab, address: str) -> str:
    """The driver that has the function at this address."""
    return lab.shell(f"basename $(readlink /sys/bus/pci/devices/{address}/driver)").text().strip()
