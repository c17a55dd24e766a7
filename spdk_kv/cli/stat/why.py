"""``spdk-kv stat --why``: available memory, and what an open store decided with it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from spdk_kv.cli.watched import folder_of
from spdk_kv.engines import Location
from spdk_kv.memory import MemoryReader
from spdk_kv.placement import owner_of
from spdk_kv.store import read_why
from spdk_kv.units import format_nbytes

_MOST_SEQUENCES = 20


def explain(place: Location, index_dir: str | None) -> dict[str, Any]:
    """The JSON object that `stat --why --json` prints.

    ``memory`` is as this process sees it; ``owner_pid`` is the process that has the store open, or
    None; ``decision`` is its last one, or None if there was none yet. Raises StoreMismatch where
    there is no store, and where the owner is another version of spdk_kv.
    """
    folder = folder_of(place, index_dir)
    reader = MemoryReader()
    available = reader.read()
    reader.close()
    owner = owner_of(os.path.join(folder, "lock"))
    # An owner that was killed leaves its file behind, which describes nothing any more.
    decision = None if owner is None else read_why(folder, owner)
    return {
        "location": str(place),
        "memory": {
            "available_nbytes": available.nbytes,
            "limited_by": available.limited_by,
            "pressure": available.pressure,
            "notes": list(available.notes),
        },
        "owner_pid": owner,
        "decision": decision,
    }


def lines_of(explained: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of (name, text) for people."""
    memory, decision = explained["memory"], explained["decision"]
    text = f"the page cache may hold {format_nbytes(memory['available_nbytes'])}, limited by "
    text += memory["limited_by"]
    if memory["pressure"] is not None:
        text += f"; pressure {memory['pressure']:.0f} %"
    rows = [("store", explained["location"]), ("memory now", text)]
    rows += [("", note) for note in memory["notes"]]
    if explained["owner_pid"] is None:
        return [*rows, ("owner", "none; no process has the store open")]
    if decision is None:
        return [*rows, ("owner", f"process {explained['owner_pid']}, which uses no sequences yet")]
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision["time"]))
    rows += [
        ("owner", f"process {decision['pid']}; its last decision, of {at}:"),
        ("policy", f"{decision['policy']}, engine {decision['engine']}"),
        ("why", decision["reason"]),
    ]
    if decision["paths"] == 1:
        return [*rows, *_sequence_rows(decision["sequences"])]
    return [
        *rows,
        ("available", f"{format_nbytes(decision['available_nbytes'])} ({decision['limited_by']})"),
        ("budget", f"{format_nbytes(decision['budget_nbytes'])} of layers in the page cache"),
        *_sequence_rows(decision["sequences"]),
        *_copy_rows(decision),
        ("reads", _reads(decision)),
        (
            "moves",
            f"{decision['promotions']:,} promotions to the page cache and "
            f"{decision['demotions']:,} demotions, in {decision['decisions']:,} decisions",
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
    """Rows for a store whose page cache holds copies of what is on its drive."""
    folder = decision.get("page_cache_dir")
    if not folder:
        return []
    text = (
        f"page cache of a file in {folder}: {format_nbytes(decision['copied_nbytes'])} of "
        f"{format_nbytes(decision['cached_nbytes'])} copied, "
        f"{format_nbytes(decision['written_nbytes'])} written in total"
    )
    rows = [("copies", text)]
    if decision["trouble"]:
        rows.append(("", f"copying is suspended: {decision['trouble']}"))
    return rows


def _reads(decision: Mapping[str, Any]) -> str:
    filled = ""
    if not decision.get("page_cache_dir"):
        filled = f"{format_nbytes(decision['filled_nbytes'])} fills, "
    text = (
        f"{format_nbytes(decision['cached_read_nbytes'])} through the page cache ({filled}"
        f"{format_nbytes(decision['missed_nbytes'])} misses), "
        f"{format_nbytes(decision['direct_read_nbytes'])} directly"
    )
    if decision["taken_over_nbytes"]:
        text += f"; {format_nbytes(decision['taken_over_nbytes'])} after the other path had failed"
    return text
