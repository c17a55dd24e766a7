"""The keys themselves: what every other kind is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spdk_kv.sparse.keys.base import Floats, State, as_floats, check_append, check_query, taken
from spdk_kv.sparse.keys.growing import Growing


class Exact:
    """All keys as float32: nothing is estimated, and nothing is saved. See `Keys`."""

    def __init__(self) -> None:
        self._keys: Growing[np.float32] | None = None  # [batch, kv_heads, tokens, head_dim]

    @property
    def tokens(self) -> int:
        return 0 if self._keys is None else self._keys.tokens

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None else self._keys.nbytes

    @property
    def kv_heads(self) -> int:
        return 0 if self._shape is None else self._shape[1]

    @property
    def token_nbytes(self) -> float:
        return 0.0 if self._keys is None else self._keys.token_nbytes

    def append(self, k: torch.Tensor, *, first: Sequence[int] | None = None) -> None:
        check_append(k, self._shape)
        if not k.shape[2]:
            return
        if self.tokens and self._keys is not None:
            self._keys.append(as_floats(k))
        else:
            self._keys = Growing(as_floats(k))

    def scores(self, q: torch.Tensor) -> Floats:
        check_query(q, self._shape)
        assert self._keys is not None
        keys = self._keys.held
        batch, kv_heads, tokens, head_dim = keys.shape
        queries = as_floats(q).reshape(batch, kv_heads, -1, head_dim)
        with np.errstate(invalid="ignore", over="ignore"):
            found: Floats = queries @ keys.swapaxes(-1, -2)
        return found.reshape(batch, -1, tokens)

    def truncate(self, tokens: int) -> None:
        if self._keys is not None:
            self._keys.truncate(tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        if self._keys is not None:
            self._keys.reorder(rows)

    def copy(self, tokens: int | None = None) -> Exact:
        other = Exact()
        if self._keys is not None:
            other._keys = self._keys.copy(tokens)
        return other

    def state(self) -> State:
        return {} if self._keys is None else {"keys": self._keys.held}

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[np.generic]]) -> Exact:
        """What `state` gave; an empty one is that of an object without tokens.

        Raises:
            ValueError: the array is missing or of another kind.
        """
        made = cls()
        if state:
            made._keys = Growing(taken(state, "keys", 4, np.float32))
        return made

    @property
    def _shape(self) -> tuple[int, int, int] | None:
        if self._keys is None or not self.tokens:
            return None
        batch, kv_heads, _, head_dim = self._keys.held.shape
        return batch, kv_heads, head_dim
