"""Machines whose drive may not be taken: the wrong drive, or one that something uses now."""

from __future__ import annotations

from collections.abc import Callable

from binding.machine import BDF, SERIAL, Machine

DISK = f"sys/devices/pci0000:00/{BDF}/nvme/nvme0/nvme0n1"
CASES: list[tuple[str, set[str], Callable[[Machine], object]]] = []


def case(*expected: str) -> Callable[[Callable[[Machine], object]], Callable[[Machine], object]]:
    """Keeps a function that spoils the machine, with the codes that bind must then give."""

    def keep(make: Callable[[Machine], object]) -> Callable[[Machine], object]:
        CASES.append((make.__name__, set(expected), make))
        return make

    return keep


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
