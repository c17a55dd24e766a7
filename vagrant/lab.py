#!/usr/bin/env python3
"""A whole PC with NVMe drives, an IOMMU and vfio-pci, in plain QEMU: no Vagrant, no drive needed.

    lab.py run [options] -- COMMAND...   boot, run COMMAND inside, give its output and exit status
    lab.py shell [options]               boot with a shell on this terminal; `exit` ends it
    lab.py check                         what the lab needs and this host lacks

The guest's root is this host's, read-only under an overlay in memory: programs, the checkout and
SPDK are there under the same paths, and nothing that the guest writes outlives it, except in
/run/lab, which is an empty folder of the host's. Exit status: that of COMMAND; 3 where the lab
cannot run here; 4 where the machine failed; 124 after the timeout.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from labkit.guestlink import GuestLost
from labkit.hardware import MIB, Drive, Hardware, default_drives
from labkit.machine import Machine
from labkit.needs import (
    LabUnavailable,
    install_command,
    missing_for_tests,
    missing_packages,
)

CANNOT, FAILED, TIMED_OUT = 3, 4, 124


def say(*words: object) -> None:
    print("lab:", *words, file=sys.stderr, flush=True)


def parse_drive(text: str) -> Drive:
    """``NAME[,serial=S][,mib=N][,block=512|4096][,image=FILE][,with=NAME]``."""
    name, *settings = text.split(",")
    drive = Drive(name, f"LAB-{name.upper()}")
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "serial":
            drive.serial = value
        elif key == "mib":
            drive.nbytes = int(value) * MIB
        elif key == "block" and value in ("512", "4096"):
            drive.block_nbytes = int(value)
        elif key == "image":
            drive.image = Path(value).absolute()
        elif key == "with":
            drive.shares_group_with = value
        else:
            raise argparse.ArgumentTypeError(f"not a setting of a drive: {setting}")
    return drive


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    check = modes.add_parser(
        "check",
        help="what this host lacks, for all tests as well; exit status 3 if a boot needs it",
    )
    machine = argparse.ArgumentParser(add_help=False)
    for with_install in (check, machine):
        with_install.add_argument(
            "--install", action="store_true", help="as root: install what is missing with apt-get"
        )
    machine.add_argument(
        "--drive", action="append", type=parse_drive, metavar="NAME[,...]",
        help="a drive (instead of n0 with 512-byte blocks and n1 with 4096-byte ones): "
        "NAME[,serial=S][,mib=N][,block=512|4096][,image=FILE][,with=NAME of the drive that it "
        "shares its IOMMU group with]; may be repeated",
    )  # fmt: skip
    machine.add_argument("--no-iommu", action="store_true", help="a machine without an IOMMU")
    machine.add_argument("--accel", choices=("kvm", "tcg"), help="instead of trying KVM first")
    machine.add_argument("--cpus", type=int, default=2)
    machine.add_argument("--memory-mib", type=int, default=3072)
    machine.add_argument("--hugepages-mib", type=int, default=512)
    run = modes.add_parser("run", parents=[machine], help="run a command inside")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    run.add_argument("--user", help="run it as this user of the host, not as root")
    run.add_argument("command", nargs="+", help="the command, after --")
    modes.add_parser("shell", parents=[machine], help="a shell inside, on this terminal")
    return parser.parse_args(argv)


def check_packages(install: bool, for_tests: bool) -> bool:
    """Whether all packages are there, after installing them where asked and allowed.
    ``for_tests``: those as well without which tests are skipped, which are not needed to boot."""
    missing = missing_packages() + (missing_for_tests() if for_tests else [])
    if missing and install and os.geteuid() == 0:
        command = install_command(missing)
        say("installing:", *missing)
        subprocess.run(["apt-get", "update"], stdout=sys.stderr, check=False)
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(command, stdout=sys.stderr, env=env, check=False)
        missing = missing_packages() + (missing_for_tests() if for_tests else [])
    if missing:
        say("missing:", *missing)
        say("install with:", *install_command(missing), "(or as root: lab.py check --install)")
    return not missing_packages()


def make_machine(options: argparse.Namespace) -> Machine:
    hardware = Hardware(
        drives=options.drive or default_drives(),
        iommu=not options.no_iommu,
        cpus=options.cpus,
        memory_nbytes=options.memory_mib * MIB,
        hugepage_nbytes=options.hugepages_mib * MIB,
    )
    return Machine(hardware, accelerator=options.accel)


def run_command(options: argparse.Namespace) -> int:
    def show(stream: str, piece: bytes) -> None:
        to = sys.stdout if stream == "out" else sys.stderr
        to.buffer.write(piece)
        to.flush()

    with make_machine(options) as machine:
        command = machine.run(
            *options.command,
            timeout_s=options.timeout,
            user=options.user,
            cwd=os.getcwd(),
            on_output=show,
        )
    if command.timed_out:
        say(f"killed after {options.timeout:.0f} s")
        return TIMED_OUT
    assert command.status is not None
    # As shells say it: 128 and the signal.
    return command.status if command.status >= 0 else 128 - command.status


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    # So that a polite kill, too, takes the machine down with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not check_packages(options.install, for_tests=options.mode == "check"):
        return CANNOT
    try:
        if options.mode == "check":
            return 0
        if options.mode == "shell":
            machine = make_machine(options)
            try:
                return machine.shell()
            finally:
                machine.stop()
        return run_command(options)
    except LabUnavailable as unavailable:
        say(unavailable)
        return CANNOT
    except (GuestLost, TimeoutError) as failed:
        say(failed)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
