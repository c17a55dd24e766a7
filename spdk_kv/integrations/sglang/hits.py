"""How much of a prompt is there, where several pools have to have it: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """A pool beside the one of the KV pages.

    ``stored``: for each page of the prompt whether this pool has it. ``trailing``: how many pages
    at the end of what is restored it has to have; None: all of it.
    """

    name: str
    stored: Sequence[bool]
    trailing: int | None = None

    def serves(self, pages: int) -> bool:
        """Whether the first ``pages`` of the prompt can be restored."""
        first = 0 if self.trailing is None else max(0, pages - self.trailing)
        return all(self.stored[first:pages])


def leading(stored: Sequence[bool]) -> int:
    """How many are there before the first that is not."""
    return next((at for at, there in enumerate(stored) if not there), len(stored))


def restorable(kv_pages: int, pools: Sequence[Wanted]) -> tuple[list[int], dict[str, int]]:
    """Up to which pages a prompt can be restored whose first ``kv_pages`` are stored.

    Returns:
        Every such number of pages, ascending (a state at the end of a prompt is there at some
        pages only), and for each pool the largest of its own, if any.
    """
    possible = list(range(1, kv_pages + 1))
    own: dict[str, int] = {}
    for pool in pools:
        if not possible:
            break
        if pool.trailing is None:
            last = min(kv_pages, leading(pool.stored))
            served = set(range(1, last + 1))
        else:
            served = {pages for pages in range(1, kv_pages + 1) if pool.serves(pages)}
            last = max(served, default=0)
        if last:
            own[pool.name] = last
        possible = [pages for pages in possible if pages in served]
    return possible, own
