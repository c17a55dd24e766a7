from typing import Any

from typing_extensions import Self, disjoint_base

@disjoint_base
class MemoryBackend:
    @property
    def backend(self) -> Any: ...
    def __new__(cls, nbytes: int) -> Self: ...
