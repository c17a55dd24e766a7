"""``spdk-kv device``: the same as scripts/setup_vfio.py, for an installed package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from spdk_kv.binding import Report, Tool
from spdk_kv.terminal import json_option


def _tool() -> Tool:
    # -I: at a boot, neither the environment nor the current folder may provide modules.
    return Tool(Path("/"), [sys.executable, "-I", "-m", "spdk_kv", "device"])


def _finish(report: Report, as_json: bool) -> None:
    click.echo(report.json() if as_json else report.text(), err=bool(report.status and not as_json))
    click.get_current_context().exit(report.status)


@click.group()
def device() -> None:
    """Take NVMe drives from the kernel for vfio-pci, or give them back.

    Exit status: 0 done, 2 refused, 3 failed and rolled back.
    """


def _command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    # Applied to the command, not the function, so that --json comes after its own options.
    return lambda function: json_option(device.command(name)(function))


@_command("status")
def status(as_json: bool) -> None:
    """Show every NVMe drive and what uses it.

    Also shows whether each drive may be taken from the kernel, and if not, why.
    """
    _finish(_tool().status(), as_json)


@_command("bind")
@click.argument("bdf")
@click.argument("serial")
@click.option("--yes", is_flag=True, help="Do it; otherwise nothing is changed.")
@click.option(
    "--i-know-this-destroys",
    "destroys",
    metavar="SERIAL",
    help="Accept the loss of the contents that were listed.",
)
@click.option("--persist", is_flag=True, help="Check and bind the drive again at every boot.")
def bind(
    bdf: str, serial: str, yes: bool, destroys: str | None, persist: bool, as_json: bool
) -> None:
    """Take the drive at BDF if its serial is SERIAL. Without --yes this is a dry run."""
    report = _tool().bind(bdf, serial, yes=yes, destroys=destroys, persist=persist)
    _finish(report, as_json)


@_command("restore")
@click.argument("bdf", required=False)
def restore(bdf: str | None, as_json: bool) -> None:
    """Give back the drive at BDF, or every drive that was bound."""
    _finish(_tool().restore(bdf), as_json)


@_command("hugepages")
@click.argument("amount", metavar="N|SIZE")
def hugepages(amount: str, as_json: bool) -> None:
    """Raise the number of hugepages to N, or to SIZE. Never lowers it."""
    _finish(_tool().hugepages(amount), as_json)


@_command("permissions")
@click.option("--group", metavar="NAME", required=True, help="Group that may use the drive.")
@click.argument("bdf")
def permissions(group: str, bdf: str, as_json: bool) -> None:
    """Let a group use the bound drive at BDF.

    The group gets read and write access to the drive's VFIO node, until the drive is restored.
    """
    _finish(_tool().permissions(bdf, group), as_json)


@_command("rebind")
def rebind(as_json: bool) -> None:
    """Bind the drives that --persist has recorded.

    Runs at boot, with the same checks as bind.
    """
    _finish(_tool().rebind(), as_json)
