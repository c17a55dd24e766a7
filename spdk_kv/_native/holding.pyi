from collections.abc import Callable
from types import TracebackType
from typing import Any

from typing_extensions import Self, disjoint_base

@disjoint_base
class Held:
    def __init__(self, lock: Any, timeout_s: float, late: Callable[[], BaseException]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

@disjoint_base
class Account:
    @property
    def nbytes(self) -> int: ...
    def hold(self, nbytes: int) -> Hold: ...

@disjoint_base
class Hold:
    @property
    def nbytes(self) -> int: ...

@disjoint_base
class Registered:
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __new__(cls, region: Any) -> Self: ...
    def add(
        self, register: Callable[..., Any], unregister: Callable[[int], object], *more: Any
    ) -> Any: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@disjoint_base
class AtEnd:
    def __new__(cls, call: Callable[[Any], object], argument: Any) -> Self: ...

@disjoint_base
class Export:
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __new__(cls, thing: Any) -> Self: ...
