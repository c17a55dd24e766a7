"""What `adapter_params` of LMCache's configuration may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spdk_kv.integrations.opening import Opening, read_opening


@dataclass(frozen=True)
class Options:
    """The options.

    Attributes:
        opening: The store. Its ``capacity`` bounds what is stored, over restarts as well; LMCache's
            own ``max_capacity_gb`` begins to count at zero. Its ``identity`` is what LMCache's keys
            do not say and must not be mixed: the data type of the KV cache, the weights' revision.
            Of two servers with different text there neither finds what the other stored.
        workers: Threads, each of which does one batch at a time.
        most_pending: Batches that may be unfinished before a store is declined, so that a slow
            drive is not owed more and more. Loads are always taken.
    """

    opening: Opening
    workers: int = 4
    most_pending: int | None = 256

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """The options in ``given``: ``workers``, ``most_pending``, and those of the store.
        ValueError says what is wrong with them."""
        opening, own = read_opening(given, "adapter_params", ("workers", "most_pending"))
        options = cls(opening, **own)
        if options.workers < 2:
            raise ValueError(f"adapter_params: workers is 2 or more, not {options.workers!r}")
        return options
