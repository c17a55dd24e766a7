"""The newest tokens of one layer, which stay in memory."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

# Room for so many tokens more than there are: what there is moves once for so many tokens.
_SPARE_TOKENS = 64

Pair = tuple[torch.Tensor, torch.Tensor]


class Recent:
    """K and V of tokens ``[begin, end)``, on the device of the model's own.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self.begin = self.end = 0
        # [batch, room, kv_heads, width] each; the token `begin` is at `_at`.
        self._buffers: Pair | None = None
        self._at = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory, room for further tokens included."""
        return 0 if self._buffers is None else sum(each.nbytes for each in self._buffers)

    def holds(self, begin: int, end: int) -> bool:
        """Whether all tokens of ``[begin, end)`` are here, and none after them."""
        return self._buffers is not None and self.begin <= begin <= end == self.end

    def hold(self, k: torch.Tensor, v: torch.Tensor, begin: int) -> None:
        """Holds copies of these tokens, ``[batch, kv_heads, tokens, width]``, in place of what
        there was; the first one is ``begin``."""
        self.forget()
        room = k.shape[2] + _SPARE_TOKENS
        # A tensor made in inference mode cannot be changed outside it.
        with torch.inference_mode(False):
            buffers = _roomy(k, room), _roomy(v, room)
        _fill(buffers, (k, v), 0)
        self._buffers, self._at = buffers, 0
        self.begin, self.end = begin, begin + k.shape[2]

    def add(self, k: torch.Tensor, v: torch.Tensor, begin: int) -> None:
        """Adds the next tokens, and drops those before ``begin``."""
        assert self._buffers is not None
        buffer = self._buffers[0]
        full = self._at + self.end - self.begin + k.shape[2] > buffer.shape[1]
        if full or buffer.device != k.device:  # it was read into host memory
            held_k, held_v = (each.to(k.device) for each in self.since(begin))
            whole = torch.cat([held_k, k], dim=2), torch.cat([held_v, v], dim=2)
            self.hold(*whole, begin)
            return
        _fill(self._buffers, (k, v), self._at + self.end - self.begin)
        self.end += k.shape[2]
        self._at += begin - self.begin
        self.begin = begin

    def since(self, begin: int) -> Pair:
        """Views of the tokens from ``begin`` on, ``[batch, kv_heads, tokens, width]``."""
        assert self._buffers is not None
        k, v = self._buffers
        part = slice(self._at + begin - self.begin, self._at + self.end - self.begin)
        return k[:, part].transpose(1, 2), v[:, part].transpose(1, 2)

    def cut(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on."""
        if tokens <= self.begin:
            self.forget()
        else:
            self.end = min(self.end, tokens)

    def select(self, rows: Rows[int]) -> None:
        """The batch becomes the ``rows`` of what it was."""
        if self._buffers is None:
            return
        with torch.inference_mode(False):
            index = torch.tensor(rows, device=self._buffers[0].device)
            k, v = (each.index_select(0, index) for each in self._buffers)
        self._buffers = k, v

    def forget(self) -> None:
        """Holds nothing any more."""
        self._buffers, self._at = None, 0
        self.begin = self.end = 0


def _roomy(tokens: torch.Tensor, room: int) -> torch.Tensor:
    batch, heads, _, width = tokens.shape
    return torch.empty((batch, room, heads, width), dtype=tokens.dtype, device=tokens.device)


def _fill(buffers: Pair, tokens: Pair, at: int) -> None:
    for buffer, new in zip(buffers, tokens, strict=True):
        buffer[:, at : at + new.shape[2]] = new.transpose(1, 2)
