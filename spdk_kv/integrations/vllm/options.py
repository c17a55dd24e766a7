"""What an entry of vLLM's `secondary_tiers` may say about a tier of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spdk_kv.integrations.opening import Opening, read_opening
from spdk_kv.store import KVStore
from spdk_kv.units import parse_nbytes


@dataclass(frozen=True)
class TierOptions:
    """The keywords of a tier: those of its store (``opening``), and its own.

    ``identity`` is any text that tells two models of one name apart, such as a revision; with it,
    the files of a model in a folder are not looked at. ``workers`` is the number of threads that
    move jobs. ``most_waiting`` is how many bytes of blocks to store may wait, before further ones
    are declined: an int or text like ``"2 GiB"``, by default half of vLLM's CPU cache, which a
    block that waits takes up. ``patience_s``: lookups miss while a load waits longer than that.
    ``locality`` is passed on to vLLM: ``"LOCAL"`` or ``"REMOTE"``.
    """

    opening: Opening
    workers: int = 4
    most_waiting: int | str | None = None
    patience_s: float = 10.0
    locality: str | None = None

    def __post_init__(self) -> None:
        if self.most_waiting_nbytes(1) < 1:
            raise ValueError(f"most_waiting is at least 1 byte, not {self.most_waiting!r}")
        if self.patience_s <= 0:
            raise ValueError(f"patience_s is more than 0 seconds, not {self.patience_s!r}")
        if self.workers < 2:
            raise ValueError(f"workers is at least 2, one of them for loads, not {self.workers!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TierOptions:
        """The options of an entry. ValueError names what is unknown, missing or senseless."""
        own = [each.name for each in fields(cls) if each.name != "opening"]
        opening, others = read_opening(given, "SpdkKvTier", own)
        return cls(opening, **others)

    def most_waiting_nbytes(self, cache_nbytes: int) -> int:
        """How many bytes of blocks to store may wait beside a CPU cache of so many bytes."""
        if self.most_waiting is None:
            return max(1, cache_nbytes // 2)
        return parse_nbytes(self.most_waiting)

    def open(self, replica: int) -> KVStore:
        """Opens the store; ``{dp}`` in the location becomes the number of the engine's replica.
        Raises what :func:`spdk_kv.open` raises. Blocks on the drive."""
        return self.opening.open(self.opening.location.replace("{dp}", str(replica)))
