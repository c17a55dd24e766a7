"""What `adapter_params` of LMCache's configuration may say, and how a store is opened by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spdk_kv.store import EngineOptions, KVStore
from spdk_kv.store import open as open_store


@dataclass(frozen=True)
class Options:
    """The options; those that :func:`spdk_kv.open` has are passed on to it.

    Attributes:
        location: Where the store is, a URI or a folder.
        capacity: Bytes at most, as an int or text like ``"64 GiB"``. This bounds what is stored,
            over restarts as well; LMCache's own ``max_capacity_gb`` begins to count at zero.
        identity: What LMCache's keys do not say and must not be mixed: the data type of the KV
            cache, the weights' revision. Of two servers with different text here neither finds
            what the other stored.
        read_only: Find and load only; see :func:`spdk_kv.open`.
        create, eviction, index_dir, flush_interval_s, write_budget: See :func:`spdk_kv.open`.
        engine: The engine's name, or the fields of :class:`EngineOptions` by name.
        workers: Threads, each of which does one batch at a time.
        most_pending: Batches that may be unfinished before a store is declined, so that a slow
            drive is not owed more and more. Loads are always taken.
    """

    location: str
    capacity: int | str | None = None
    identity: str = ""
    read_only: bool = False
    create: bool | None = None
    eviction: str = "slru"
    index_dir: str | None = None
    flush_interval_s: float | None = 5.0
    write_budget: str | None = None
    engine: str | Mapping[str, Any] | None = None
    workers: int = 4
    most_pending: int | None = 256

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """The options in ``given``. TypeError names those that there are not, ValueError says what
        does not go together."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(
                f"adapter_params: there is no {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(known)}"
            )
        if not isinstance(given.get("location"), str) or not given["location"]:
            raise TypeError('adapter_params: "location" is needed, as "file:///var/cache/kv"')
        options = cls(**given)
        if not isinstance(options.identity, str):
            raise TypeError(f"adapter_params: identity is text, not {options.identity!r}")
        if options.workers < 2:
            raise ValueError(f"adapter_params: workers is 2 or more, not {options.workers!r}")
        return options

    def open(self) -> KVStore:
        """The store. Raises what :func:`spdk_kv.open` does: StoreLocked, with its PID, where
        another process has it open."""
        given = self.engine
        engine = EngineOptions(**given) if isinstance(given, Mapping) else given
        if self.read_only:
            return open_store(
                self.location, read_only=True, engine=engine, index_dir=self.index_dir
            )
        return open_store(
            self.location,
            capacity=self.capacity,
            create=self.create,
            engine=engine,
            eviction=self.eviction,  # type: ignore[arg-type]  # opening checks it
            index_dir=self.index_dir,
            flush_interval_s=self.flush_interval_s,
            write_budget=self.write_budget,
        )
