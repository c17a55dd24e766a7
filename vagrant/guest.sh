#!/bin/sh
# Prepares the guest: the drivers, hugepages and mounts that spdk_kv's NVMe-direct path wants.
# Vagrant's provisioner and lab.py both use it, as root.
#
#   guest.sh iommu              turn the IOMMU on in the boot loader; exit 1 when nothing changed
#   guest.sh prepare [MIB]      load the drivers, reserve MIB of hugepages (512), mount what is missing
#   guest.sh boot MIB WHAT...   what lab.py's guest runs as its first process: prepare, then WHAT
set -eu

say() { printf 'guest.sh: %s\n' "$*" >&2; }

mounted() { grep -q " $1 " /proc/self/mounts; }

# mount_at FOLDER TYPE [OPTIONS]: unless something is mounted there.
mount_at() {
    if mounted "$1"; then
        return
    fi
    mkdir -p "$1"
    mount -t "$2" -o "${3:-rw}" "$2" "$1" || say "no $2 at $1"
}

# Raises the number of 2 MiB pages, never lowers it.
reserve_hugepages() {
    pages=$(($1 / 2))
    now=$(cat /proc/sys/vm/nr_hugepages)
    if [ "$now" -lt "$pages" ]; then
        echo "$pages" >/proc/sys/vm/nr_hugepages
        now=$(cat /proc/sys/vm/nr_hugepages)
        [ "$now" -ge "$pages" ] || say "only $now of $pages hugepages: memory is too fragmented"
    fi
}

prepare() {
    mount_at /dev/pts devpts gid=5,mode=620
    mount_at /dev/shm tmpfs mode=1777
    mount_at /dev/hugepages hugetlbfs mode=1770
    # What else a test wants (nvmet, loop, dm), it or the kernel loads when it is used.
    modprobe -a nvme vfio-pci || say 'no NVMe or VFIO driver'
    reserve_hugepages "${1:-512}"
}

turn_iommu_on() {
    if [ -n "$(ls /sys/kernel/iommu_groups)" ]; then
        return 1
    fi
    mkdir -p /etc/default/grub.d
    # shellcheck disable=SC2016 # the boot loader's script expands it
    echo 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=on"' >/etc/default/grub.d/iommu.cfg
    update-grub
}

boot() {
    mib=$1
    shift
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    export PATH
    # Locks and sockets of the host's services have no business here.
    mount -t tmpfs -o mode=1777 tmp /var/tmp || true
    ip link set lo up 2>/dev/null || true
    hostname spdk-kv-lab 2>/dev/null || true
    prepare "$mib"
    # Not exec: as the first process this shell also buries what others leave behind.
    "$@" || say "$1 ended with status $?"
    sync
    echo o >/proc/sysrq-trigger
    # No program: its file may be out of reach by now, and the first process must not end.
    while :; do :; done
}

case ${1:-} in
    iommu) turn_iommu_on ;;
    prepare) prepare "${2:-512}" ;;
    boot)
        shift
        boot "$@"
        ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
