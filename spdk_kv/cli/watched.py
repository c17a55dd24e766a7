"""Stores that other processes have open, as `top` and `metrics` see them from outside."""

from __future__ import annotations

import os
from dataclasses import dataclass

import click

from spdk_kv.engines import Location, parse_location
from spdk_kv.errors import SpdkKvError, StoreMismatch
from spdk_kv.metrics import Reading, read_published
from spdk_kv.placement import owner_of

index_dir_option = click.option(
    "--index-dir",
    type=click.Path(file_okay=False),
    help="Folder of the index, if the store is on a drive of its own and not at its usual place.",
)


@dataclass(frozen=True)
class Seen:
    """A store at one moment: the process that has it open, what that tells, and what is wrong.

    ``owner`` is None, and there is no ``reading``, where no process has it open; ``trouble`` is
    then empty, as it is where all is well.
    """

    owner: int | None
    reading: Reading | None
    trouble: str = ""


@dataclass(frozen=True)
class Watched:
    """The store at ``place``, whose index and lock are in ``folder``."""

    place: Location
    folder: str

    @property
    def name(self) -> str:
        return str(self.place)

    def look(self) -> Seen:
        """Reads two small files. Takes no lock, and disturbs nobody."""
        owner = owner_of(os.path.join(self.folder, "lock"))
        try:
            reading = read_published(self.folder, owner)
        except PermissionError as refused:
            return Seen(owner, None, f"only its user may see that: {refused.filename}")
        except (OSError, SpdkKvError) as failed:
            return Seen(owner, None, str(failed))
        if reading is not None:
            return Seen(reading.pid, reading)
        if owner is None:
            return Seen(None, None)
        return Seen(
            owner,
            None,
            "it tells nothing (yet, or because it is closing, another version of spdk_kv, or "
            f"because nothing can be written to {self.folder})",
        )


def watch(
    locations: tuple[str, ...], index_dir: str | None, *, must_exist: bool = True
) -> list[Watched]:
    """What is to be watched. UsageError for what makes no sense; StoreMismatch where there is no
    store, and it ``must_exist``."""
    found = []
    for location in dict.fromkeys(locations):
        try:
            place = parse_location(location)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if place.scheme in ("ram", "null"):
            raise click.UsageError(
                f"{place} has no folder, so nobody outside sees what it counts: in its process, "
                "call spdk_kv.metrics.register(store)"
            )
        found.append(Watched(place, folder_of(place, index_dir, must_exist=must_exist)))
    if index_dir is not None and len(found) > 1:
        raise click.UsageError("--index-dir is the folder of one store")
    return found


def folder_of(place: Location, index_dir: str | None, *, must_exist: bool = True) -> str:
    """Where the index and the lock of the store at ``place`` are. UsageError; StoreMismatch where
    there is none, and it ``must_exist``."""
    if place.scheme == "file":
        if index_dir is not None:
            raise click.UsageError("--index-dir does not apply to file:// stores")
        folder = place.path
    elif index_dir is not None:
        folder = index_dir
    else:
        from spdk_kv.store import index_folder  # not for a folder: it loads much

        folder = index_folder(place)
    if must_exist and not os.path.exists(os.path.join(folder, "index.sqlite")):
        raise StoreMismatch(f"no store at {place}: there is no index in {folder}")
    return folder
