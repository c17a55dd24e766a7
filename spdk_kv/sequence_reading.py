"""One reading of a layer's tokens: the commands under way, their check, the batch's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.transfer import Transfer
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError

if TYPE_CHECKING:
    import torch

CRC_NBYTES = 4
"""Of a chunk's checksum, as the index keeps it."""


@dataclass
class Reading:
    """Tokens ``[first, ...)`` of some extents of a layer on their way into one lease.

    ``start``: byte of the extents at which the lease begins; ``stride``: bytes of the lease per
    extent; ``until``: byte up to which the transfers asked for so far cover them;
    ``chunk_nbytes``: bytes that share a checksum.
    """

    extents: range
    first: int
    start: int
    stride: int
    until: int
    chunk_nbytes: int
    lease: Any
    transfers: list[tuple[Transfer, int, int]] = field(default_factory=list)

    def complete(self, engine: Engine, crcs: Sequence[bytearray] | None) -> None:
        """Waits until all is there. ``crcs``: per extent of the layer, the checksums of its chunks;
        CorruptionError where one differs."""
        for transfer, start, end in self.transfers:
            engine.wait(transfer)
            if crcs is None:
                continue
            wanted = slice(
                start // self.chunk_nbytes * CRC_NBYTES, end // self.chunk_nbytes * CRC_NBYTES
            )
            for line, number in enumerate(self.extents):
                if transfer.chunk_crcs(line) != crcs[number][wanted]:
                    raise CorruptionError(
                        f"stored bytes between {start} and {end} of extent {number} are not those "
                        "that were appended (CRC32C differs)"
                    )


def reordered(rows: torch.Tensor, stored: np.ndarray[Any, np.dtype[np.int32]]) -> torch.Tensor:
    """``rows`` (bytes, [extents, tokens * row]) with row b of the batch of token t taken from its
    row ``stored[t, b]``. On bytes, for torch indexes not every dtype."""
    import torch

    tokens, batch = stored.shape
    index = np.arange(tokens)[:, None] * batch + stored
    flat = rows.reshape(rows.shape[0], tokens * batch, -1 if tokens else 1)
    picked = torch.index_select(flat, 1, torch.from_numpy(index.reshape(-1)))
    return picked.reshape(rows.shape)
