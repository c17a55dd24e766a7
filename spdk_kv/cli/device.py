"""``spdk-kv device``: scripts/setup_vfio.py, for those who have the package installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from spdk_kv.binding import Report, Tool
from spdk_kv.terminal import json_option


def _tool() -> Tool:
    # -I: neither the environment nor the current folder may put modules in a boot's way.
    return Tool(Path("/"), [sys.executable, "-I", "-m", "spdk_kv", "device"])


def _finish(report: Report, as_json: bool) -> None:
    click.echo(report.json() if as_json else report.text(), err=bool(report.status and not as_json))
    click.get_current_context().exit(report.status)


@click.group()
def device() -> None:
    """Take NVMe drives from the kernel for vfio-pci, and give them back.

    Exit status: 0 done, 2 refused, 3 failed and rolled back.
    """


def _command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    return lambda function: device.command(name)(json_option(function))


@_command("status")
def status(as_json: bool) -> None:
    """Show every NVMe drive, who uses it, and why it may or may not be taken."""
    _finish(_tool().status(), as_json)


@_command("bind")
@click.argument("bdf")
@click.argument("serial")
@click.option("--yes", is_flag=True, help="Do it.")
@click.option(
    "--i-know-this-destroys",
    "destroys",
    metavar="SERIAL",
    help="After its contents were listed: they may all go.",
)
@click.option("--persist", is_flag=True, help="Look and bind at every boot.")
def bind(
    bdf: str, serial: str, yes: bool, destroys: str | None, persist: bool, as_json: bool
) -> None:
    """Take the drive at BDF, if it has that SERIAL; a dry run until --yes."""
    report = _tool().bind(bdf, serial, yes=yes, destroys=destroys, persist=persist)
    _finish(report, as_json)


@_command("restore")
@click.argument("bdf", required=False)
def restore(bdf: str | None, as_json: bool) -> None:
    """Give back the drive at BDF, or all that this tool has bound."""
    _finish(_tool().restore(bdf), as_json)


@_command("hugepages")
@click.argument("amount", metavar="N|SIZE")
def hugepages(amount: str, as_json: bool) -> None:
    """Raise the number of hugepages; never lowers it."""
    _finish(_tool().hugepages(amount), as_json)


@_command("permissions")
@click.option("--group", required=True, help="The group that may use the drive.")
@click.argument("bdf")
def permissions(group: str, bdf: str, as_json: bool) -> None:
    """Let a group use the VFIO node of the bound drive at BDF."""
    _finish(_tool().permissions(bdf, group), as_json)


@_command("rebind")
def rebind(as_json: bool) -> None:
    """At boot: bind what --persist has recorded, with all checks."""
    _finish(_tool().rebind(), as_json)
