from typing import Any

class PoolBackend:
    backend: Any
    def __init__(
        self, fd: int, threads: int, *, buffered: bool = False, mapped_fd: int = -1
    ) -> None: ...
    @property
    def threads(self) -> int: ...
    def close(self) -> None: ...
