"""What an entry of vLLM's `secondary_tiers` may say about a tier of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from spdk_kv.store import EngineOptions, KVStore
from spdk_kv.store import open as open_store
from spdk_kv.units import parse_nbytes


@dataclass(frozen=True)
class TierOptions:
    """The keywords of a tier. Those up to ``read_only`` are as in :func:`spdk_kv.open`;
    ``engine`` may also be a mapping of the fields of EngineOptions.

    ``identity`` is any text that tells two models of one name apart, such as a revision; with it,
    the files of a model in a folder are not looked at. ``workers`` is the number of threads that
    move jobs. ``most_waiting`` is how many bytes of blocks to store may wait, before further ones
    are declined: an int or text like ``"2 GiB"``, by default half of vLLM's CPU cache, which a
    block that waits takes up. ``patience_s``: lookups miss while a load waits longer than that.
    ``locality`` is passed on to vLLM: ``"LOCAL"`` or ``"REMOTE"``.
    """

    location: str
    capacity: int | str | None = None
    create: bool | None = None
    engine: str | Mapping[str, Any] | None = None
    eviction: str = "slru"
    verify: bool = True
    index_dir: str | None = None
    flush_interval_s: float | None = 5.0
    write_budget: str | None = None
    read_only: bool = False
    identity: str = ""
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
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"SpdkKvTier has no option {name!r}{hint}; it has {', '.join(known)}"
                )
        if not given.get("location"):
            raise ValueError(
                "SpdkKvTier needs a location, such as 'file:///var/cache/kv': a folder or drive "
                "for its store"
            )
        return cls(**given)

    def most_waiting_nbytes(self, cache_nbytes: int) -> int:
        """How many bytes of blocks to store may wait beside a CPU cache of so many bytes."""
        if self.most_waiting is None:
            return max(1, cache_nbytes // 2)
        return parse_nbytes(self.most_waiting)

    def _engine(self) -> str | EngineOptions | None:
        if self.engine is None or isinstance(self.engine, str):
            return self.engine
        return EngineOptions(**self.engine)

    def open(self, replica: int) -> KVStore:
        """Opens the store; ``{dp}`` in the location becomes the number of the engine's replica.
        Raises what :func:`spdk_kv.open` raises. Blocks on the drive."""
        return open_store(
            self.location.replace("{dp}", str(replica)),
            capacity=self.capacity,
            create=self.create,
            engine=self._engine(),
            eviction=self.eviction,  # type: ignore[arg-type]  # checked there
            verify=self.verify,
            index_dir=self.index_dir,
            flush_interval_s=self.flush_interval_s,
            write_budget=self.write_budget,
            read_only=self.read_only,
        )
