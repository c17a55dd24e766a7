"""Keys of the kind that settings name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from spdk_kv.sparse.keys.base import Floats, Keys
from spdk_kv.sparse.keys.codes import Codes
from spdk_kv.sparse.keys.exact import Exact
from spdk_kv.sparse.keys.lowrank import LowRank
from spdk_kv.sparse.settings import Settings


def make_keys(settings: Settings, adapter: Floats | None = None) -> Keys:
    """Keys without tokens, of the kind ``settings.keys``.

    Args:
        adapter: of the low-rank projection, see `LowRank`; other kinds need none.
    """
    if settings.keys == "lowrank":
        return LowRank(settings.rank, adapter)
    return Exact() if settings.keys == "exact" else Codes()


def keys_from_state(settings: Settings, state: Mapping[str, npt.NDArray[np.generic]]) -> Keys:
    """Keys of the kind ``settings.keys`` from what their `Keys.state` gave.

    Raises:
        ValueError: arrays are missing or do not fit to each other.
    """
    if settings.keys == "lowrank":
        return LowRank.from_state(state)
    return Exact.from_state(state) if settings.keys == "exact" else Codes.from_state(state)
