"""Machines whose drive may not be taken: needed later, not empty, not isolated, or not knowable."""

from __future__ import annotations

import os
import struct
import subprocess

from binding.cases_use import DISK, case
from binding.machine import GROUP, MIB, SERIAL, Machine
from spdk_kv.devices.inspection.kernel import Completed

UUID = "ace48742-e53b-4f91-a6a5-facbecc5399f"


# Who will use it.


def with_ext4(m: Machine) -> None:
    label = ["-L", "my data", "-U", UUID]
    subprocess.run(["/sbin/mkfs.ext4", "-q", *label, m.root / "dev/nvme0n1"], check=True)


@case("configured")
def fstab_by_path(m: Machine) -> None:
    m.write("etc/fstab", "# /dev/sda1 / ext4\n/dev/nvme0n1p1 /data ext4 noauto 0 0")
    m.partition()


@case("configured")
def fstab_by_link(m: Machine) -> None:
    m.symlink("dev/disk/by-path/pci-0000:01:00.0-nvme-1", "../../nvme0n1")
    m.write("etc/fstab", "/dev/disk/by-path/pci-0000:01:00.0-nvme-1 /data ext4 noauto 0 0")


@case("configured")
def fstab_by_link_to_a_node_that_is_missing(m: Machine) -> None:
    m.partition()
    (m.root / "dev/nvme0n1p1").unlink()
    m.symlink("dev/disk/by-label/data", "../../nvme0n1p1")
    m.write("etc/fstab", "/dev/disk/by-label/data /data ext4 noauto 0 0")


@case("configured")
def fstab_by_an_id_whose_link_is_gone(m: Machine) -> None:
    m.write("etc/fstab", f"/dev/disk/by-id/nvme-ACME_{SERIAL}-part1 /data ext4 noauto 0 0")


@case("configured", "signature")
def fstab_by_uuid(m: Machine) -> None:
    with_ext4(m)
    m.write("etc/fstab", f'UUID="{UUID.upper()}" /data ext4 noauto 0 0')


@case("configured", "signature")
def fstab_by_label(m: Machine) -> None:
    with_ext4(m)
    m.write("etc/fstab", "LABEL=my\\040data /data ext4 noauto 0 0")


@case("configured")
def fstab_by_partition_uuid(m: Machine) -> None:
    m.partition()
    answer = "ID_PART_ENTRY_UUID=11111111-2222-3333-4444-555555555555"
    m.kernel.answers["blkid", "nvme0n1p1"] = Completed(0, answer, "")
    m.write("etc/fstab", "PARTUUID=11111111-2222-3333-4444-555555555555 /data ext4 noauto 0 0")


@case("configured", "signature")
def fstab_by_the_short_uuid_of_fat(m: Machine) -> None:
    answer = '{"signatures": [{"type": "vfat", "offset": "0x0", "uuid": "1234-ABCD"}]}'
    m.kernel.answers["wipefs", "nvme0n1"] = Completed(0, answer, "")
    m.kernel.answers["blkid", "nvme0n1"] = Completed(0, "ID_FS_UUID_ENC=1234-ABCD", "")
    m.write("etc/fstab", "UUID=1234-ABCD /data vfat noauto 0 0")


@case("signature")
def short_uuid_within_another(m: Machine) -> None:
    fstab_by_the_short_uuid_of_fat(m)
    m.write("etc/fstab", "UUID=00001234-abcd-0000-0000-000000000000 /data ext4 noauto 0 0")


@case("configured", "signature")
def crypttab(m: Machine) -> None:
    with_ext4(m)
    m.write("etc/crypttab", f"data UUID={UUID} none luks,noauto")


@case("configured", "signature")
def mdadm_by_its_way_of_writing_a_uuid(m: Machine) -> None:
    with_ext4(m)
    digits = UUID.replace("-", "")
    array = ":".join(digits[i : i + 8] for i in range(0, 32, 8))
    m.write("etc/mdadm/mdadm.conf", f"ARRAY /dev/md0 metadata=1.2 UUID={array}")


@case("configured")
def mdadm_by_pattern(m: Machine) -> None:
    m.write("etc/mdadm.conf", "DEVICE /dev/nvme0n*")


@case("configured")
def systemd_mount_unit(m: Machine) -> None:
    m.write("etc/systemd/system/data.mount", "[Mount]\nWhat=/dev/nvme0n1\nWhere=/data")


@case("unreadable")
def unreadable_fstab(m: Machine) -> None:
    (m.root / "etc").mkdir()
    with (m.root / "etc/fstab").open("wb") as file:
        file.truncate(17 * MIB)


@case("system")
def resume_on_the_command_line_by_number(m: Machine) -> None:
    m.write("proc/cmdline", "quiet resume=259:1 rw")


@case("system")
def root_on_the_command_line_in_hexadecimal(m: Machine) -> None:
    m.write("proc/cmdline", "quiet root=10301 rw")  # 259 is 103 in hexadecimal


@case("system")
def resume_device(m: Machine) -> None:
    m.write("sys/power/resume", "259:1")


@case("system", "signature")
def resume_in_the_initramfs(m: Machine) -> None:
    with_ext4(m)
    m.write("etc/initramfs-tools/conf.d/resume", f"RESUME=UUID={UUID}")


@case("system", "signature")
def grub(m: Machine) -> None:
    with_ext4(m)
    m.write("boot/grub/grub.cfg", f"search --no-floppy --fs-uuid --set=root {UUID}")


@case("system")
def efi_partition_of_another_system(m: Machine) -> None:
    m.partition()
    answer = "ID_PART_ENTRY_TYPE=c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
    m.kernel.answers["blkid", "nvme0n1p1"] = Completed(0, answer, "")


@case("system")
def firmware_boot_entry(m: Machine) -> None:
    m.partition()
    known = "11111111-2222-3333-4444-555555555555"
    m.kernel.answers["blkid", "nvme0n1p1"] = Completed(0, f"ID_PART_ENTRY_UUID={known}", "")
    entry = m.root / "sys/firmware/efi/efivars/Boot0001-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"HD" + bytes.fromhex("11111111222233334444555555555555") + b"x")


# What is on it.


@case("signature")
def filesystem(m: Machine) -> None:
    with_ext4(m)


@case("signature")
def filesystem_in_a_partition(m: Machine) -> None:
    m.partition()
    subprocess.run(["/sbin/mkfs.ext4", "-q", m.root / "dev/nvme0n1p1"], check=True)


@case("signature")
def unused_swap(m: Machine) -> None:
    subprocess.run(["/sbin/mkswap", "-q", m.root / "dev/nvme0n1"], check=True)


@case("signature")
def one_zfs_label_at_the_very_end(m: Machine) -> None:
    with (m.root / "dev/nvme0n1").open("r+b") as file:
        file.seek(8 * MIB - 256 * 1024 + 130 * 1024)
        file.write(struct.pack(">Q", 0x00BAB10C))


@case("data")
def data_without_a_signature(m: Machine) -> None:
    with (m.root / "dev/nvme0n1").open("r+b") as file:
        file.seek(5 * MIB + 12345)
        file.write(b"\1")


@case("data")
def data_on_the_second_namespace(m: Machine) -> None:
    m.namespace(2)
    with (m.root / "dev/nvme0n2").open("r+b") as file:
        file.seek(100)
        file.write(b"\1")


@case("data")
def data_in_the_middle_of_a_large_drive(m: Machine) -> None:
    size = 64 << 30
    os.truncate(m.root / "dev/nvme0n1", size)
    m.write(f"{DISK}/size", str(size // 512))
    with (m.root / "dev/nvme0n1").open("r+b") as file:
        file.seek(size // 3)
        for _ in range(16):  # longer than the distance between two samples
            file.write(b"\1" * MIB)


@case("unreadable")
def medium_that_ends_early(m: Machine) -> None:
    os.truncate(m.root / "dev/nvme0n1", 4 * MIB)


@case("tool-missing")
def no_wipefs(m: Machine) -> None:
    m.kernel.missing_tools.add("wipefs")


@case("tool-missing")
def no_blkid(m: Machine) -> None:
    m.kernel.missing_tools.add("blkid")


@case("unreadable")
def wipefs_fails(m: Machine) -> None:
    m.kernel.answers["wipefs", "nvme0n1"] = Completed(1, "", "cannot open")


@case("unreadable")
def wipefs_says_something_else(m: Machine) -> None:
    m.kernel.answers["wipefs", "nvme0n1"] = Completed(0, "no signatures\n", "")


@case("unreadable")
def blkid_cannot_decide(m: Machine) -> None:
    m.kernel.answers["blkid", "nvme0n1"] = Completed(8, "", "ambivalent result")


# What protects memory from it.


@case("no-iommu")
def no_iommu(m: Machine) -> None:
    (m.root / m.device / "iommu_group").unlink()


@case("no-iommu")
def no_iommu_mode_of_vfio(m: Machine) -> None:
    m.write(f"sys/kernel/iommu_groups/{GROUP}/name", "vfio-noiommu")


@case("iommu-shared")
def shared_group(m: Machine) -> None:
    m.link(f"sys/kernel/iommu_groups/{GROUP}/devices/0000:01:00.1", "sys/devices/x")


@case("vfio-missing")
def no_vfio(m: Machine) -> None:
    (m.root / "sys/bus/pci/drivers/vfio-pci").rename(m.root / "sys/none")


@case("tool-missing")
def vfio_only_as_a_module_and_no_modprobe(m: Machine) -> None:
    no_vfio(m)
    m.write("lib/modules/6.1.0/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz:")
    m.kernel.missing_tools.add("modprobe")


# Whether the answers can be trusted.


@case("not-root")
def not_root(m: Machine) -> None:
    m.kernel.root_user = False


@case("not-host")
def container_with_processes_of_its_own(m: Machine) -> None:
    (m.root / "proc/self/ns/pid").unlink()
    m.symlink("proc/self/ns/pid", "pid:[4026532000]")


@case("not-host")
def root_of_a_user_namespace(m: Machine) -> None:
    (m.root / "proc/self/ns/user").unlink()
    m.symlink("proc/self/ns/user", "user:[4026532000]")


@case("not-host")
def container_with_the_hosts_processes(m: Machine) -> None:
    (m.root / "proc/self/ns/mnt").unlink()
    m.symlink("proc/self/ns/mnt", "mnt:[100]")


@case("unreadable")
def mountinfo_that_cannot_be_read(m: Machine) -> None:
    task = m.process("77", "secret")
    (m.root / task / "mountinfo").unlink()  # and yet it lives


@case("unreadable")
def mountinfo_of_an_unknown_form(m: Machine) -> None:
    m.write(f"{m.process('77', 'new')}/mountinfo", "a new format")


@case("unreadable", "not-host")
def no_process_in_sight(m: Machine) -> None:
    (m.root / "proc/1").rename(m.root / "proc/hidden")


@case("journal")
def journal_open_to_others(m: Machine) -> None:
    (m.root / "run/spdk_kv").mkdir()
    os.chmod(m.root / "run/spdk_kv", 0o755)


@case("journal")
def journal_that_is_nonsense(m: Machine) -> None:
    (m.root / "run/spdk_kv").mkdir(mode=0o700)
    m.write("run/spdk_kv/bound-0000:05:00.0.json", '{"bdf": "0000:05:00.0"')
