"""``spdk-kv stat --why``: the memory there is, and what an open store made of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import click

from spdk_kv.engines import Location
from spdk_kv.errors import StoreMismatch
from spdk_kv.memory import MemoryReader
from spdk_kv.placement import owner_of
from spdk_kv.store import index_folder, read_why
from spdk_kv.units import format_nbytes

_MOST_SEQUENCES = 20


def explain(place: Location, index_dir: str | None) -> dict[str, Any]:
    """The JSON object: ``memory`` as this process sees it, ``owner_pid`` of who has the store open
    (None: nobody), and its last ``decision`` (None: there was none yet). StoreMismatch where there
    is no store."""
    if place.scheme == "file":
        if index_dir is not None:
            raise click.UsageError("index_dir is for stores on devices")
        folder = place.path
    else:
        folder = index_dir or index_folder(place)
    if not os.path.exists(os.path.join(folder, "index.sqlite")):
        raise StoreMismatch(f"no store at {place}: there is no index in {folder}")
    reader = MemoryReader()
    budget = reader.read()
    reader.close()
    owner = owner_of(os.path.join(folder, "lock"))
    told = read_why(folder)
    return {
        "location": str(place),
        "memory": {
            "budget_nbytes": budget.nbytes,
            "limited_by": budget.limited_by,
            "pressure": budget.pressure,
            "notes": list(budget.notes),
        },
        "owner_pid": owner,
        # Of an owner that was killed the file is still there; its pages are nobody's any more.
        "decision": told if told is not None and told["pid"] == owner else None,
    }


def lines_of(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) for people."""
    memory, decision = told["memory"], told["decision"]
    text = f"the page cache may hold {format_nbytes(memory['budget_nbytes'])}, limited by "
    text += memory["limited_by"]
    if memory["pressure"] is not None:
        text += f"; pressure {memory['pressure']:.0f} %"
    rows = [("store", told["location"]), ("memory now", text)]
    rows += [("", note) for note in memory["notes"]]
    if told["owner_pid"] is None:
        return [*rows, ("owner", "no process has it open: nothing is decided")]
    if decision is None:
        return [*rows, ("owner", f"process {told['owner_pid']}, which has no sequences in use yet")]
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision["time"]))
    rows += [
        ("owner", f"process {decision['pid']}; what follows is of {at}, its last change"),
        ("policy", f"{decision['policy']}, engine {decision['engine']}"),
        ("why", decision["reason"]),
    ]
    if decision["paths"] == 1:
        return [*rows, *_sequence_rows(decision["sequences"])]
    return [
        *rows,
        ("budget", f"{format_nbytes(decision['budget_nbytes'])} ({decision['limited_by']})"),
        ("X", f"{format_nbytes(decision['limit_nbytes'])} for layers in the page cache"),
        *_sequence_rows(decision["sequences"]),
        *_copy_rows(decision),
        ("reads", _reads(decision)),
        (
            "moves",
            f"{decision['promotions']:,} units to the page cache and {decision['demotions']:,} off "
            f"it, in {decision['decisions']:,} decisions",
        ),
    ]


def _sequence_rows(sequences: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for sequence in sequences[:_MOST_SEQUENCES]:
        parts = [
            f"{name} {sequence[f'{part}_cached_units']} of {sequence[f'{part}_units']} "
            f"({format_nbytes(sequence[f'{part}_cached_nbytes'])} of "
            f"{format_nbytes(sequence[f'{part}_nbytes'])})"
            for part, name in (("k", "K"), ("v", "V"))
        ]
        rows.append(("cached", f"{sequence['name']}: layers of {parts[0]}, of {parts[1]}"))
    if len(sequences) > _MOST_SEQUENCES:
        rows.append(("", f"and {len(sequences) - _MOST_SEQUENCES:,} more sequences"))
    return rows


def _copy_rows(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a store whose page cache has copies of what is on its drive."""
    folder = decision.get("page_cache_dir")
    if not folder:
        return []
    text = (
        f"page cache of a file in {folder}: {format_nbytes(decision['copied_nbytes'])} of "
        f"{format_nbytes(decision['cached_nbytes'])} are there, "
        f"{format_nbytes(decision['written_nbytes'])} were copied in all"
    )
    rows = [("copies", text)]
    if decision["trouble"]:
        rows.append(("", f"nothing is copied at present: {decision['trouble']}"))
    return rows


def _reads(decision: Mapping[str, Any]) -> str:
    filled = ""
    if not decision.get("page_cache_dir"):
        filled = f"{format_nbytes(decision['filled_nbytes'])} filled it, "
    text = (
        f"{format_nbytes(decision['cached_read_nbytes'])} through the page cache (of it {filled}"
        f"{format_nbytes(decision['missed_nbytes'])} had been evicted), "
        f"{format_nbytes(decision['direct_read_nbytes'])} directly"
    )
    if decision["taken_over_nbytes"]:
        text += f"; {format_nbytes(decision['taken_over_nbytes'])} that one path could not deliver"
    return text
