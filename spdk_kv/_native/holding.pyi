from collections.abc import Callable
from types import TracebackType
from typing import Any

from typing_extensions import disjoint_base

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
