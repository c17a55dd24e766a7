"""``spdk-kv stat``: what a store holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from spdk_kv.devices import read_health
from spdk_kv.engines import parse_location
from spdk_kv.placement import Superblock
from spdk_kv.terminal import console, is_terminal, json_option, print_json
from spdk_kv.units import format_nbytes

if TYPE_CHECKING:
    from spdk_kv.store import KVStore


@click.command()
@click.argument("location", metavar="URI")
@click.option(
    "--index-dir",
    type=click.Path(file_okay=False),
    help="Folder of the index, if the store is on a drive of its own and not at its usual place.",
)
@click.option(
    "--prompts", is_flag=True, help="List the texts that caches stored: tokens, hits, last use."
)
@click.option("--why", is_flag=True, help="Show how an open store reads its layers, and why.")
@json_option
def stat(location: str, index_dir: str | None, prompts: bool, why: bool, as_json: bool) -> None:
    """Show what the store at URI holds.

    The store is read only, beside a process that has it open as well: what that has flushed is
    counted. A drive that SPDK or passthrough drives is opened briefly instead; if another process
    has it open, the error names its PID, and the exit status is 1. A missing store is not created.

    With --why the store is not opened: the output is what the process that has it open last
    decided, and that process is not disturbed.
    """
    try:
        place = parse_location(location)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if place.scheme in ("ram", "null"):
        raise click.UsageError(f"{place} holds nothing once its process has ended")
    if why:
        from spdk_kv.cli.stat.why import explain, lines_of

        explained = explain(place, index_dir)
        if as_json:
            print_json(explained)
        else:
            _print_rows(lines_of(explained))
        return
    from spdk_kv.store import EngineOptions  # loads torch: not for `--help`
    from spdk_kv.store import open as open_store

    try:
        store = open_store(
            location,
            create=False,
            index_dir=index_dir,
            flush_interval_s=None,
            read_only=place.scheme in ("file", "block"),
            engine=EngineOptions(discard=False),  # leaves the data file as it is
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with store:
        if prompts:
            from spdk_kv.cli.stat.prompts import lines_of as lines_of_prompts
            from spdk_kv.cli.stat.prompts import stored_prompts

            listed = stored_prompts(store)
            if as_json:
                print_json({"prompts": listed})
            else:
                _print_rows(lines_of_prompts(listed))
            return
        report = _report(store, place.scheme != "file")
    # Of a drive that SPDK has, the kernel knows nothing.
    health = read_health(place.path) if place.scheme in ("file", "block", "ng") else None
    report["health"] = None if health is None else asdict(health)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _report(store: KVStore, on_drive: bool) -> dict[str, Any]:
    from spdk_kv.store import read_superblock

    held = store.stats()
    return {
        "location": store.location,
        "uuid": store.uuid,
        "engine": store.engine.name,
        "direct": store.engine.direct,
        "capacity_nbytes": held["capacity_nbytes"],
        "used_nbytes": held["used_nbytes"],
        "free_nbytes": held["free_nbytes"],
        "largest_free_nbytes": held["largest_free_nbytes"],
        "blobs": held["blobs"],
        "sequences": held["sequences"],
        "superblock": _superblock_fields(read_superblock(store.engine), on_drive),
    }


def _superblock_fields(superblock: Superblock | None, on_drive: bool) -> dict[str, Any] | None:
    if superblock is None:
        return None
    fields: dict[str, Any] = {
        "uuid": superblock.uuid,
        "generation": superblock.generation,
        "block_nbytes": superblock.block_nbytes,
        "capacity_nbytes": superblock.capacity_nbytes,
    }
    if on_drive:
        fields["device_id"] = superblock.drive_id
    return fields


def _print(report: dict[str, Any]) -> None:
    share = report["used_nbytes"] / report["capacity_nbytes"]
    rows = [
        ("store", report["location"]),
        ("uuid", report["uuid"]),
        ("engine", report["engine"] + (" (past the page cache)" if report["direct"] else "")),
        ("capacity", format_nbytes(report["capacity_nbytes"])),
        ("used", f"{format_nbytes(report['used_nbytes'])} ({share:.1%})"),
        (
            "free",
            f"{format_nbytes(report['free_nbytes'])}, at most "
            f"{format_nbytes(report['largest_free_nbytes'])} in one extent",
        ),
        ("blobs", f"{report['blobs']:,}"),
        ("sequences", f"{report['sequences']:,}"),
    ]
    if superblock := report["superblock"]:
        text = f"generation {superblock['generation']}, blocks of {superblock['block_nbytes']}"
        if drive := superblock.get("device_id"):
            text += f", drive {drive}"
        rows.append(("superblock", text))
    if health := report["health"]:
        rows.append(("drive", _worn(health)))
    _print_rows(rows)


def _worn(health: dict[str, Any]) -> str:
    text = (
        f"{health['used']:.0%} of its life used, {format_nbytes(health['written_nbytes'])} written "
        f"in {health['power_on_hours']:,} hours, {health['spare']:.0%} of its spare blocks left"
    )
    if health["media_errors"]:
        text += f", {health['media_errors']:,} media errors"
    return text + (" (it warns: see its SMART log)" if health["is_critical"] else "")


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    if not is_terminal():
        for name, text in rows:
            click.echo(f"{name:<11} {text}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    console().print(table)
