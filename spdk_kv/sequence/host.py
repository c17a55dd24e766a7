"""What a sequence needs of the store that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from spdk_kv._native.transfer import Transfer
from spdk_kv.index import SequenceRecord
from spdk_kv.link import Links
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool

T = TypeVar("T")


class Records(Protocol):
    """Where a sequence gets its extents and leaves its record; the store's catalog."""

    def allocate(self, sizes: Sequence[int]) -> list[int]: ...
    def publish_sequence(self, name: str, record: SequenceRecord) -> None: ...
    def drop_sequence(
        self, name: str, offsets: Sequence[int], writes: Sequence[Transfer] = ()
    ) -> None: ...
    def abandon(self, offsets: Sequence[int]) -> None: ...
    def count_corruption(self) -> None: ...
    def commit(self, timeout_s: float | None = None) -> None: ...


class Host(Protocol):
    """The store, as far as a sequence sees it."""

    verify: bool

    @property
    def paths(self) -> Orchestrator: ...
    @property
    def staging(self) -> StagingPool: ...
    @property
    def links(self) -> Links: ...
    @property
    def catalog(self) -> Records: ...
    def check_open(self) -> None: ...
    def forget_sequence(self, sequence: Any) -> None: ...
    def run_in_background(self, work: Callable[[], T]) -> Future[T]: ...
