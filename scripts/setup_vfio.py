#!/usr/bin/env python3
"""Takes an NVMe drive from the kernel for vfio-pci, or gives it back.

    setup_vfio.py status [--json]
    setup_vfio.py bind BDF SERIAL [--yes] [--i-know-this-destroys SERIAL] [--persist] [--json]
    setup_vfio.py restore [BDF] [--json]
    setup_vfio.py hugepages N|SIZE [--json]
    setup_vfio.py permissions --group NAME BDF [--json]

Runs as root from a checkout, with the system's Python and nothing installed. Without --yes, `bind`
only shows what it would do. Exit status: 0 done, 2 refused, 3 failed and rolled back.
docs/reference/binding.md explains what is refused and why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The checkout, or the package that this script came with.
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
    # -I: at a boot, neither the environment nor the current folder may provide modules.
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
    # No abbreviations, so that --i is not accepted for --i-know-this-destroys.
    parser = argparse.ArgumentParser(
        description="Takes an NVMe drive from the kernel for vfio-pci, or gives it back.",
        epilog="Exit status: 0 done, 2 refused, 3 failed and rolled back.",
        allow_abbrev=False,
    )
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)  # for tests
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands_of.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    add("status", "Show every NVMe drive, what uses it, and whether it may be taken.")
    bind = add("bind", "Take a drive from the kernel. Without --yes this is a dry run.")
    bind.add_argument("bdf", metavar="BDF", help="full PCI address, such as 0000:01:00.0")
    bind.add_argument("serial", metavar="SERIAL", help="serial of the drive, as status shows it")
    bind.add_argument("--yes", action="store_true", help="do it; otherwise nothing is changed")
    bind.add_argument(
        "--i-know-this-destroys",
        dest="destroys",
        metavar="SERIAL",
        help="accept the loss of the contents that were listed",
    )
    bind.add_argument(
        "--persist", action="store_true", help="check and bind it again at every boot"
    )
    restore = add("restore", "Give back the drive at BDF, or every drive that was bound.")
    restore.add_argument("bdf", metavar="BDF", nargs="?")
    hugepages = add("hugepages", "Raise the number of hugepages. Never lowers it.")
    hugepages.add_argument(
        "amount", metavar="N|SIZE", help="number of pages, or a size such as 2GiB"
    )
    permissions = add("permissions", "Let a group use the bound drive at BDF.")
    permissions.add_argument("--group", metavar="NAME", required=True)
    permissions.add_argument("bdf", metavar="BDF")
    add("rebind", "Bind the drives that --persist has recorded; run at boot.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
