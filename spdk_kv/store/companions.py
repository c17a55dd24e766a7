"""Blobs that go with a sequence: what else its owner keeps for its tokens.

They are gone with it, deleted or evicted, and may be gone before, as any blob: whoever reads one
checks that it fits the tokens. Of states there are two, so that the one that the last record of the
sequence goes with stays while a newer one is put. Of what groups are selected by there is one: a
newer one serves for what was there before as well.
"""

from __future__ import annotations

SLOTS = 2
SELECTION = "selection"


def companion_key(name: str, slot: int | str) -> str:
    """The key of the blob in ``slot`` of the sequence ``name``."""
    return f"\0spdk_kv/with/{slot}/{name}"


def companion_keys(name: str) -> list[str]:
    """Those of all slots."""
    return [companion_key(name, slot) for slot in (*range(SLOTS), SELECTION)]
