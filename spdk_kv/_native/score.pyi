from typing import Any, TypeAlias

import numpy.typing as npt
from typing_extensions import Buffer

# numpy says that arrays are buffers from Python 3.12 on.
_Array: TypeAlias = Buffer | npt.NDArray[Any]

def implementation() -> str: ...
def encode(
    keys: _Array,
    mean: _Array,
    signs: _Array,
    codes: _Array,
    scales: _Array,
    implementation: str | None = None,
) -> None: ...
def score(
    queries: _Array,
    signs: _Array,
    codes: _Array,
    scales: _Array,
    out: _Array,
    implementation: str | None = None,
) -> None: ...
def softmax_max(
    scores: _Array, group: int, out: _Array, implementation: str | None = None
) -> None: ...
def top_groups(
    scores: _Array, count: int, out: _Array, implementation: str | None = None
) -> None: ...
def gather(source: _Array, offsets: _Array, nbytes: int, target: _Array) -> None: ...
