"""Every condition under which a drive is not taken, each made in a tree that really has it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from vfio_machine import BDF, GROUP, MIB, SERIAL, Machine, codes

from spdk_kv.devices.kernel import Completed
from spdk_kv.devices.reasons import Code

UUID = "ace48742-e53b-4f91-a6a5-facbecc5399f"
DISK = f"sys/devices/pci0000:00/{BDF}/nvme/nvme0/nvme0n1"
CASES: list[tuple[str, set[str], Callable[[Machine], object]]] = []


def case(*expected: str) -> Callable[[Callable[[Machine], object]], Callable[[Machine], object]]:
    def keep(make: Callable[[Machine], object]) -> Callable[[Machine], object]:
        CASES.append((make.__name__, set(expected), make))
        return make

    return keep


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# Which drive.


@case("not-found")
def no_such_function(m: Machine) -> None:
    (m.root / f"sys/bus/pci/devices/{BDF}").unlink()


@case("not-nvme")
def sata_controller(m: Machine) -> None:
    m.write(f"{m.device}/class", "0x010601")


@case("not-nvme")
def administrative_controller_only(m: Machine) -> None:
    m.write(f"{m.device}/class", "0x010803")


@case("serial-mismatch")
def another_drive_at_that_address(m: Machine) -> None:
    m.write(f"{m.controller}/serial", "OTHER")


@case("serial-mismatch")
def serial_that_only_begins_alike(m: Machine) -> None:
    m.write(f"{m.controller}/serial", SERIAL + "1")


@case("serial-unknown", "unreadable")
def unreadable_serial(m: Machine) -> None:
    (m.root / m.controller / "serial").unlink()
    (m.root / m.controller / "serial").mkdir()


@case("serial-unknown")
def no_driver(m: Machine) -> None:
    m.unlink_driver()


@case("driver-other")
def bound_to_vfio_by_someone_else(m: Machine) -> None:
    m.unlink_driver()
    m.link_driver("vfio-pci", SERIAL)


@case("not-inspectable")
def no_namespace(m: Machine) -> None:
    for name in ("nvme0n1", "ng0n1"):
        (m.root / m.controller / name).rename(m.root / f"gone-{name}")
    (m.root / "sys/class/block/nvme0n1").unlink()


@case("not-inspectable")
def namespace_with_a_character_node_only(m: Machine) -> None:
    m.link(f"{m.controller}/ng0n2", f"{m.controller}/x")


@case("not-inspectable")
def format_that_linux_cannot_read(m: Machine) -> None:
    m.namespace(2)
    m.write(f"{m.controller}/nvme0n2/size", "0")


@case("controller-not-live")
def controller_in_reset(m: Machine) -> None:
    m.write(f"{m.controller}/state", "resetting")


@case("multipath")
def second_controller_of_the_subsystem(m: Machine) -> None:
    m.link("sys/class/nvme-subsystem/nvme-subsys0/nvme1", "sys/devices/x/nvme1")


@case("unreadable")
def unknown_subsystem(m: Machine) -> None:
    (m.root / "sys/class/nvme-subsystem/nvme-subsys0/nvme0").unlink()


@case("sriov")
def virtual_functions(m: Machine) -> None:
    m.write(f"{m.device}/sriov_numvfs", "2")


@case("changed")
def node_that_leads_to_another_disk(m: Machine) -> None:
    m.kernel.numbers["dev/nvme0n1"] = "b8:0"


# Who uses it.


@case("mounted")
def mounted_in_any_process(m: Machine) -> None:
    m.mount(m.process("77", "container"), "259:1", "/data", "/dev/nvme0n1")


@case("mounted")
def mounted_in_a_thread_of_a_process(m: Machine) -> None:
    m.process("77", "runc")
    m.mount(m.process("77", "runc", thread="78"), "259:1", "/data", "none")


@case("mounted")
def mounted_where_the_first_thread_has_ended(m: Machine) -> None:
    first = m.process("77", "daemon")
    (m.root / first / "mountinfo").unlink()
    m.write(f"{first}/status", "State:\tZ (zombie)")
    m.mount(m.process("77", "daemon", thread="78"), "259:1", "/data", "none")


@case("mounted")
def partition_mounted(m: Machine) -> None:
    m.mount("proc/1/task/1", m.partition(), "/data", "none")


@case("mounted")
def partition_of_the_second_namespace_mounted(m: Machine) -> None:
    path = m.namespace(2)
    m.write(f"{path}/nvme0n2p1/partition", "1")
    m.mount("proc/1/task/1", m.disk(f"{path}/nvme0n2p1"), "/data", "none")


@case("mounted")
def namespace_that_the_controller_does_not_list(m: Machine) -> None:
    m.mount("proc/1/task/1", m.disk(f"{m.device}/elsewhere/nvme0n7"), "/data", "none")


@case("mounted")
def hidden_path_of_a_multipath_disk(m: Machine) -> None:
    m.write(f"{m.controller}/nvme5c0n1/size", "8")
    number = m.disk("sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme5n1")
    m.mount("proc/1/task/1", number, "/data", "none")


@case("mounted", "system")
def root_of_the_machine(m: Machine) -> None:
    m.mount("proc/1/task/1", m.partition(), "/", "/dev/root")


@case("mounted", "system")
def efi_partition_mounted(m: Machine) -> None:
    m.mount("proc/1/task/1", m.partition(), "/boot/efi", "/dev/nvme0n1p1", "vfat")


@case("mounted", "holder")
def mounted_through_luks_and_lvm(m: Machine) -> None:
    m.partition()
    m.holder("dm-0", f"{DISK}/nvme0n1p1")
    number = m.holder("dm-1", "sys/devices/virtual/block/dm-0")
    m.mount("proc/1/task/1", number, "/home", "/dev/mapper/vg-home")


@case("mounted", "holder", "system")
def root_on_a_partition_of_an_md_array(m: Machine) -> None:
    m.holder("md0", DISK)
    m.write("sys/devices/virtual/block/md0/md0p1/partition", "1")
    number = m.disk("sys/devices/virtual/block/md0/md0p1")
    m.mount("proc/1/task/1", number, "/", "none")


@case("mounted")
def btrfs_by_its_source(m: Machine) -> None:
    m.mount("proc/1/task/1", "0:33", "/data", "/dev/nvme0n1", "btrfs")


@case("mounted", "holder")
def btrfs_whose_mount_names_another_drive(m: Machine) -> None:
    m.link("sys/fs/btrfs/1234/devices/nvme0n1", DISK)
    m.link("sys/fs/btrfs/1234/devices/sdb", "sys/devices/x/sdb")
    m.mount("proc/1/task/1", "0:33", "/data", "/dev/sdb", "btrfs")


@case("mounted")
def bcachefs_with_several_devices(m: Machine) -> None:
    m.mount("proc/1/task/1", "0:44", "/data", "/dev/sdb:/dev/nvme0n1", "bcachefs")


@case("mounted")
def mounted_by_a_link_with_an_escaped_name(m: Machine) -> None:
    m.symlink("dev/disk/by-label/my\\x20data", "../../nvme0n1")
    m.mount("proc/1/task/1", "0:5", "/data", "/dev/disk/by-label/my\\134x20data")


@case("swap")
def swap_partition(m: Machine) -> None:
    m.partition(2)
    m.write("proc/swaps", "Filename\n/dev/nvme0n1p2   partition\t1\t0\t-2")


@case("swap", "holder")
def swap_on_device_mapper(m: Machine) -> None:
    m.holder("dm-3", DISK)
    m.write("sys/devices/virtual/block/dm-3/dm/name", "vg-swap")
    m.write("proc/swaps", "Filename\n/dev/mapper/vg-swap partition\t1\t0\t-2")


@case("holder")
def lvm(m: Machine) -> None:
    m.holder("dm-0", DISK)


@case("holder")
def holder_that_only_it_tells_of(m: Machine) -> None:
    m.disk("sys/devices/virtual/block/bcache0")
    m.link("sys/devices/virtual/block/bcache0/slaves/nvme0n1", DISK)


@case("loop")
def loop_device_by_path(m: Machine) -> None:
    m.disk("sys/devices/virtual/block/loop0")
    m.write("sys/devices/virtual/block/loop0/loop/backing_file", "/dev/nvme0n1")


@case("loop")
def loop_device_on_a_node_of_another_name(m: Machine) -> None:
    m.disk("sys/devices/virtual/block/loop0")
    m.write("sys/devices/virtual/block/loop0/loop/backing_file", "/container/node")
    m.kernel.loops["loop0"] = "b259:1"


@case("export")
def nvmet(m: Machine) -> None:
    m.write("sys/kernel/config/nvmet/subsystems/nqn/namespaces/1/device_path", "/dev/nvme0n1")


@case("export")
def nvmet_passthrough(m: Machine) -> None:
    m.write("sys/kernel/config/nvmet/subsystems/nqn/passthru/device_path", "/dev/nvme0")


@case("export")
def iscsi_target(m: Machine) -> None:
    m.write("sys/kernel/config/target/core/iblock_0/disk/udev_path", "/dev/nvme0n1")


@case("export")
def rnbd_server(m: Machine) -> None:
    m.link("sys/class/rnbd-server/ctl/devices/shared/block_dev", DISK)


@case("unreadable")
def nvmet_loaded_and_configfs_not_mounted(m: Machine) -> None:
    m.write("sys/module/nvmet/initstate", "live")


@case("open")
def open_disk(m: Machine) -> None:
    m.symlink(f"{m.process('77', 'dd')}/fd/3", "/dev/nvme0n1")


@case("open")
def open_in_a_thread_with_descriptors_of_its_own(m: Machine) -> None:
    m.process("77", "dd")
    m.symlink(f"{m.process('77', 'dd', thread='78')}/fd/3", "/dev/nvme0n1")


@case("open")
def open_generic_node(m: Machine) -> None:
    m.symlink(f"{m.process('77', 'fio')}/fd/3", "/dev/ng0n1")


@case("open")
def open_controller(m: Machine) -> None:
    m.symlink(f"{m.process('77', 'nvme')}/fd/3", "/dev/nvme0")


@case("open")
def open_under_another_name(m: Machine) -> None:
    m.symlink(f"{m.process('77', 'db')}/fd/3", "/srv/raw-disk")
    m.kernel.numbers["proc/77/task/77/fd/3"] = "b259:1"


@case("open")
def mapped_after_closing(m: Machine) -> None:
    m.write(f"{m.process('77', 'db')}/maps", "7f0-7f1 rw-s 0 00:06 9   /dev/nvme0n1")


@case("open")
def mapped_where_the_first_thread_has_ended(m: Machine) -> None:
    (m.root / m.process("77", "db") / "maps").write_text("")
    m.write(f"{m.process('77', 'db', thread='78')}/maps", "7f0-7f1 rw-s 0 00:06 9 /dev/nvme0n1")


@case("open")
def registered_with_io_uring_after_closing(m: Machine) -> None:
    task = m.process("77", "db")
    m.symlink(f"{task}/fd/5", "anon_inode:[io_uring]")
    m.write(f"{task}/fdinfo/5", "SqMask:\t0\nUserFiles:\t1\n    0: nvme0n1\nUserBufs:\t0")


@case("open-exclusive")
def claimed_by_what_shows_nowhere(m: Machine) -> None:
    m.kernel.claimed.add("nvme0n1")


@case("active-io")
def requests_in_flight(m: Machine) -> None:
    m.write(f"{DISK}/inflight", "       0        3")


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


@pytest.mark.parametrize(
    ("expected", "make"), [pytest.param(c, make, id=name) for name, c, make in CASES]
)
def test_drive_is_refused_and_untouched(
    machine: Machine, expected: set[str], make: Callable[[Machine], object]
) -> None:
    make(machine)
    media = {} if os.path.getsize(machine.root / "dev/nvme0n1") > 1 << 30 else machine.media()
    driver = machine.driver_name()
    report = machine.bind()
    assert (codes(report), report.status) == (expected, 2), report.text()
    assert machine.kernel.log == []
    assert machine.driver_name() == driver
    assert machine.record() is None
    if media:
        assert machine.media() == media


def test_every_reason_that_a_drive_can_give_has_a_case() -> None:
    elsewhere = {"not-shown", "busy", "unfinished", "not-ours", "in-use", "not-possible"}
    assert {code for _, expected, _ in CASES for code in expected} | elsewhere == {
        code.value for code in Code
    }


def test_drive_that_nothing_uses_is_not_refused(machine: Machine) -> None:
    machine.write("etc/fstab", "/dev/sda1 / ext4\nUUID=ffff-0000 /boot vfat\n#/dev/nvme0n1 /old x")
    machine.write("proc/cmdline", "root=/dev/sda1 resume=8:2 console=ttyS0")
    machine.symlink(f"{machine.process('77', 'dd')}/fd/3", "/dev/nvme0n11")
    machine.mount("proc/1/task/1", "259:77", "/other", "/dev/nvme1n1")
    machine.write("proc/swaps", "Filename\n/dev/sda2 partition\t1\t0\t-2")
    report = machine.bind(yes=False)
    assert (report.status, codes(report)) == (0, set()), report.text()


@pytest.mark.parametrize("bdf", ["01:00.0", "all", "*", "0000:01:00.*", "0000:01:00.0 ", ""])
def test_only_one_full_address_is_taken(machine: Machine, bdf: str) -> None:
    report = machine.tool().bind(bdf, SERIAL, yes=True)
    assert (report.status, codes(report)) == (2, {"not-found"})


def test_drive_in_use_is_neither_opened_nor_looked_into(machine: Machine) -> None:
    machine.holder("md0", DISK)
    machine.kernel.claimed.add("nvme0n1")  # an attempt would add open-exclusive
    assert codes(machine.bind()) == {"holder"}
    assert machine.kernel.commands == []
