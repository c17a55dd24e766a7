"""Whether what is on a drive and an index are of one store, and of one time."""

from __future__ import annotations

from typing import Protocol

from spdk_kv.engines import Engine, Location
from spdk_kv.errors import StoreMismatch
from spdk_kv.placement import Superblock, fit_drive_id

NEXT_GENERATION = "next generation"
"""Key in the index of the generation that an open is about to write."""


class IndexFacts(Protocol):
    """What an index says of itself."""

    path: str
    uuid: str
    commits: int

    @property
    def generation(self) -> int: ...
    def get_meta(self, name: str) -> str | None: ...


def check_match(
    place: Location, drive: Engine, index: IndexFacts, current: Superblock | None, counted: int
) -> int:
    """StoreMismatch unless ``index`` belongs to what ``drive`` holds, whose superblock is
    ``current``, and has made the commits that the drive has ``counted``. Returns the generation
    that both have, or are about to have."""
    # Generation 0: the index of a store whose making was interrupted.
    generation = index.generation
    if current is None and generation:
        raise StoreMismatch(
            f"{place}: the index is that of store {index.uuid}, but the data carries no "
            f"superblock: it was replaced or wiped. Put it back, or remove {index.path}* to start "
            "empty"
        )
    if current is not None and current.uuid != index.uuid:
        raise StoreMismatch(
            f"{place}: the data is that of store {current.uuid}, the index that of {index.uuid}"
        )
    if index.commits < counted:
        raise StoreMismatch(
            f"{place}: the index {index.path} has made {index.commits} commits, and the data has "
            f"seen {counted}: it is an old copy. Put the newest one back, or remove the store to "
            "start empty"
        )
    if current is None:
        return generation
    if current.generation != generation:
        if str(current.generation) != index.get_meta(NEXT_GENERATION):
            raise StoreMismatch(
                f"{place}: data of generation {current.generation} beside an index of generation "
                f"{generation}: one of them is an old copy"
            )
        generation = current.generation
    identity = fit_drive_id(drive.identity)
    if current.drive_id != identity:
        raise StoreMismatch(
            f"{place}: the store was made on drive {current.drive_id!r}, this is {identity!r}"
        )
    if current.geometry and current.geometry != drive.geometry:
        raise StoreMismatch(
            f"{place}: the store was made on a drive of {current.geometry}, this one has "
            f"{drive.geometry}: it was formatted anew, resized or replaced, and is not touched"
        )
    return generation
