from typing import Any

from typing_extensions import Self, disjoint_base

@disjoint_base
class PoolBackend:
    @property
    def backend(self) -> Any: ...
    def __new__(
        cls, fd: int, threads: int, *, buffered: bool = False, mapped_fd: int = -1
    ) -> Self: ...
    @property
    def threads(self) -> int: ...
    def close(self) -> None: ...
