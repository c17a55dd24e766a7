"""K or V of a layer that stays in memory, and room behind it for the tokens to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Room for more tokens, as a share of those that there are, and at least. Chosen: so large that a
# token's share of the next copy is small beside attention, which reads all of it; so small that
# what is not used yet hardly counts.
_SPARE_SHARE = 16
_LEAST_SPARE = 128


@dataclass(eq=False)
class _Memory:
    """``tensor``: ``[batch, heads, room, width]``. ``used``: tokens of it that were written."""

    tensor: torch.Tensor
    used: int


class Kept:
    """The tokens ``[batch, heads, tokens, width]`` of a layer; never changed once they are handed
    out. ``tensor`` has to be the keeper's own, in one piece."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._memory = _Memory(tensor, tensor.shape[2])
        self._end = tensor.shape[2]

    def followed_by(self, new: torch.Tensor, past: int) -> Kept:
        """The last ``past`` of its tokens, and ``new``, likewise shaped.

        What DynamicCache copies anew for each token is copied only when there is no room left.
        """
        before = self.tensor[:, :, self.tensor.shape[2] - past :]
        if torch.is_grad_enabled():
            # Autograd would take a write into memory that it has seen for a change of that.
            return Kept(torch.cat([before, new], dim=2))
        memory, begin, count = self._memory, self._end, new.shape[2]
        # Also where others went on from the same tokens, as after a pass that ended half-way.
        if memory.used != begin or begin + count > memory.tensor.shape[2]:
            memory, begin = _roomy(before, past + count), past
        memory.used = begin + count
        memory.tensor[:, :, begin : begin + count] = new
        following = Kept.__new__(Kept)
        following.tensor = memory.tensor[:, :, begin - past : begin + count]
        following._memory, following._end = memory, begin + count
        return following


def _roomy(tokens: torch.Tensor, count: int) -> _Memory:
    """``tokens`` in memory with room for ``count``, and some to spare."""
    batch, heads, used, width = tokens.shape
    room = count + max(_LEAST_SPARE, count // _SPARE_SHARE)
    # A tensor made in inference mode cannot be changed outside it.
    with torch.inference_mode(False):
        made = torch.empty((batch, heads, room, width), dtype=tokens.dtype, device=tokens.device)
    made[:, :, :used] = tokens
    return _Memory(made, used)
