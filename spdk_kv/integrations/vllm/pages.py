"""The blocks of a job, named and found when a worker comes to them, not when vLLM submits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from spdk_kv.integrations.pages import Page


class Pages(Sequence[Page]):
    """For each key of a job its name in the store, and its row of vLLM's CPU cache."""

    def __init__(
        self,
        name: Callable[[bytes], str],
        keys: Sequence[bytes],
        rows: np.ndarray[Any, Any],
        chunk_ids: Sequence[int],
    ) -> None:
        self._name = name
        self._keys = keys
        self._rows = rows
        self._chunk_ids = chunk_ids

    @cached_property
    def _pages(self) -> list[Page]:
        return [
            (self._name(key), self._rows[chunk_id])
            for key, chunk_id in zip(self._keys, self._chunk_ids, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages)

    @overload
    def __getitem__(self, at: int) -> Page: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Page]: ...
    def __getitem__(self, at: int | slice) -> Page | Sequence[Page]:
        return self._pages[at]
