"""``spdk-kv trim``: free space goes back to the filesystem or the drive."""

from __future__ import annotations

import click

from spdk_kv.engines import parse_location
from spdk_kv.terminal import json_option, print_json
from spdk_kv.units import format_nbytes


@click.command()
@click.argument("location", metavar="URI")
@click.option(
    "--index-dir",
    type=click.Path(file_okay=False),
    help="Folder of the index, if the store is on a drive of its own and not at its usual place.",
)
@click.option("--compact", is_flag=True, help="First move blobs to the beginning of the store.")
@json_option
def trim(location: str, index_dir: str | None, compact: bool, as_json: bool) -> None:
    """Give the free space of the store at URI back.

    The end and the holes of a data file go back to its filesystem; a drive is told of all that is
    free (TRIM). Nothing that is stored is lost.

    With --compact blobs are first moved from the end of the store into free space nearer to its
    beginning, so that a data file gets shorter, and a store can be opened with a smaller capacity.

    A missing store is not created. If another process has it open, the error names its PID, and the
    exit status is 1; that process gives space back by itself, or by store.trim().
    """
    try:
        place = parse_location(location)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if place.scheme in ("ram", "null"):
        raise click.UsageError(f"{place} holds nothing once its process has ended")
    from spdk_kv.store import EngineOptions  # loads torch: not for `--help`
    from spdk_kv.store import open as open_store

    try:
        store = open_store(
            location,
            create=False,
            index_dir=index_dir,
            flush_interval_s=None,
            engine=EngineOptions(discard=False),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with store:
        given = store.compact() if compact else store.trim()
        held = store.stats()
        taken = store.engine.stored_nbytes
    report = {
        "location": str(place),
        "given_back_nbytes": given,
        "used_nbytes": held["used_nbytes"],
        "free_nbytes": held["free_nbytes"],
        "data_file_nbytes": taken,
    }
    if as_json:
        print_json(report)
        return
    on_disk = "" if taken is None else f"; its data file takes {format_nbytes(taken)}"
    click.echo(
        f"{format_nbytes(given)} given back; {format_nbytes(held['used_nbytes'])} of {place} are "
        f"in use{on_disk}"
    )
