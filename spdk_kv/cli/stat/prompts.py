"""``spdk-kv stat --prompts``: the texts whose K/V is stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spdk_kv.errors import KeyNotFound
from spdk_kv.integrations.notes import read_head

if TYPE_CHECKING:
    from spdk_kv.store import KVStore

_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def stored_prompts(store: KVStore) -> list[dict[str, Any]]:
    """Name, tokens, rows, hits and Unix time of the last use of each text, used last first."""
    found = []
    for name in store.sequences():
        try:
            head = read_head(store.sequence_note(name))
        except KeyNotFound:
            continue
        if head is not None:
            fields = {"tokens": head.tokens, "rows": head.rows, "hits": head.hits}
            found.append({"name": name, **fields, "used_s": head.used_s})
    return sorted(found, key=lambda each: -each["used_s"])


def lines_of(prompts: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The same for people: the name, and what there is to say of it."""
    now_s = time.time()
    return [
        (
            each["name"],
            f"{each['tokens']:,} tokens"
            + (f" x {each['rows']} rows" if each["rows"] > 1 else "")
            + f", {each['hits']:,} hits, used {_age(now_s - each['used_s'])} ago",
        )
        for each in prompts
    ] or [("prompts", "none")]


def _age(seconds: float) -> str:
    for name, unit_s in _UNITS:
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
