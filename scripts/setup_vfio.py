#!/usr/bin/env python3
"""Takes an NVMe drive from the kernel for vfio-pci, and gives it back.

    setup_vfio.py status [--json]
    setup_vfio.py bind BDF SERIAL [--yes] [--i-know-this-destroys SERIAL] [--persist] [--json]
    setup_vfio.py restore [BDF] [--json]
    setup_vfio.py hugepages N|SIZE [--json]
    setup_vfio.py permissions --group NAME BDF [--json]

Runs as root from a checkout, with the system's Python and nothing installed. `bind` only says
what it would do until --yes. Exit status: 0 done, 2 refused, 3 failed and rolled back.
docs/reference/binding.md explains what is refused and why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The checkout, or whatever package this script was handed out with.
_CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_CHECKOUT))
# Root must not leave files in a user's checkout.
sys.dont_write_bytecode = True

from spdk_kv.binding import Report, Tool  # noqa: E402


def main() -> int:
    arguments = _parser().parse_args()
    report = _run(arguments)
    if arguments.json:
        print(report.json())
    else:
        print(report.text(), file=sys.stderr if report.status else sys.stdout)
    return report.status


def _run(arguments: argparse.Namespace) -> Report:
    # -I: neither the environment nor the folder it is called from may put modules in its way.
    program = [sys.executable, "-I", str(Path(__file__).resolve())]
    tool = Tool(Path(arguments.root), program)
    if arguments.command == "status":
        return tool.status()
    if arguments.command == "bind":
        return tool.bind(
            arguments.bdf,
            arguments.serial,
            yes=arguments.yes,
            destroys=arguments.destroys,
            persist=arguments.persist,
        )
    if arguments.command == "restore":
        return tool.restore(arguments.bdf)
    if arguments.command == "hugepages":
        return tool.hugepages(arguments.amount)
    if arguments.command == "permissions":
        return tool.permissions(arguments.bdf, arguments.group)
    return tool.rebind()


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: --i must not stand for --i-know-this-destroys.
    parser = argparse.ArgumentParser(
        description="Takes an NVMe drive from the kernel for vfio-pci, and gives it back.",
        epilog="Exit status: 0 done, 2 refused, 3 failed and rolled back.",
        allow_abbrev=False,
    )
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)  # for tests
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands_of.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    add("status", "Show every NVMe drive, who uses it, and why it may or may not be taken.")
    bind = add("bind", "Take a drive from the kernel; a dry run until --yes.")
    bind.add_argument("bdf", metavar="BDF", help="its full PCI address, like 0000:01:00.0")
    bind.add_argument("serial", metavar="SERIAL", help="its serial, as status shows it")
    bind.add_argument("--yes", action="store_true", help="do it")
    bind.add_argument(
        "--i-know-this-destroys",
        dest="destroys",
        metavar="SERIAL",
        help="after its contents were listed: they may all go",
    )
    bind.add_argument("--persist", action="store_true", help="look and bind at every boot")
    restore = add("restore", "Give back the drive, or all that this tool has bound.")
    restore.add_argument("bdf", metavar="BDF", nargs="?")
    hugepages = add("hugepages", "Raise the number of hugepages; never lowers it.")
    hugepages.add_argument("amount", metavar="N|SIZE", help="a number of pages, or like 2GiB")
    permissions = add("permissions", "Let a group use the VFIO node of a bound drive.")
    permissions.add_argument("--group", metavar="NAME", required=True)
    permissions.add_argument("bdf", metavar="BDF")
    add("rebind", "At boot: bind what --persist has recorded, with all checks.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
