"""What a fit needs of the keys of one layer, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


class GramMatrix:
    """K^T K of all keys that were added, each the keys of all KV heads of a token joined.

    Its eigenvectors are the right singular vectors of K (not centred), and its size is that of a
    key, however many tokens there are. One thread at a time.

    Attributes:
        tokens: how many keys were added.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: torch.Tensor | None = None  # float64, [width, width]

    def add(self, k: torch.Tensor) -> None:
        """Adds ``k``, [batch, kv_heads, tokens, head_dim] after RoPE, on any device.

        Raises:
            ValueError: keys are not finite, or wider than those before.
        """
        joined = k.detach().transpose(1, 2).flatten(0, 1).flatten(1).to(torch.float64)
        if not torch.isfinite(joined).all():
            raise ValueError("keys are not finite")
        width = joined.shape[1]
        if self._sum is None:
            self._sum = torch.zeros((width, width), dtype=torch.float64, device=joined.device)
        if len(self._sum) != width:
            raise ValueError(f"keys of {width} elements after such of {len(self._sum)}")
        self._sum += joined.T @ joined
        self.tokens += len(joined)

    def directions(self, rank: int | None = None) -> tuple[npt.NDArray[np.float32], float]:
        """The directions that hold most of the keys.

        Args:
            rank: how many; None: an eighth of kv_heads * head_dim.

        Returns:
            float32 [kv_heads * head_dim, rank], orthonormal columns, those that hold most first;
            and the share of the keys' energy (sum of squares) that they hold.

        Raises:
            ValueError: no key was added, or a key has fewer elements than ``rank``.
        """
        if self._sum is None:
            raise ValueError("no keys to fit to")
        width = len(self._sum)
        rank = max(1, width // 8) if rank is None else rank
        if not 1 <= rank <= width:
            raise ValueError(f"a rank from 1 to {width}, not {rank}")
        values, vectors = np.linalg.eigh(self._sum.cpu().numpy())
        kept, total = values[::-1][:rank].sum(), values.sum()
        matrix = np.ascontiguousarray(vectors[:, ::-1][:, :rank], np.float32)
        return matrix, float(kept / total) if total > 0 else 1.0
