"""The calls of a sequence that read groups of tokens, wherever they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spdk_kv.deadline import Deadline
from spdk_kv.sequence.arguments import group_list
from spdk_kv.sequence.foundation import Foundation
from spdk_kv.sequence.groups import GroupReading, start_groups

if TYPE_CHECKING:
    import torch


class GroupCalls(Foundation):
    """A part of :class:`Sequence`."""

    def start_groups(
        self, layer: int, groups: Any, group_tokens: int, *, timeout_s: float | None = None
    ) -> GroupReading:
        """Starts to read groups of tokens of a layer, in one transfer. Does not wait for the drive,
        but for other threads' calls on the layer.

        Args:
            layer: Number of the layer, of a sequence with granularity ``token``.
            groups: Whole numbers, ``[n, 2]``: for each group the row of the batch and its number;
                group ``g`` is tokens ``g * group_tokens`` to before ``(g + 1) * group_tokens``.
            group_tokens: Tokens of a group.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            The reading; its :meth:`~GroupReading.finish` waits for it. Appends meanwhile do not
            disturb it, a truncation or reordering ends it.

        Raises:
            ShapeMismatch: There is no such layer, row or whole group, or the sequence has another
                granularity.
            DeviceTimeout: The layer was in use for longer than ``timeout_s``.
            DeviceError: A write of the layer failed earlier.
            ClosedError: The sequence was deleted, or the store closed.
        """
        deadline = Deadline(timeout_s)
        source = self._layer(layer, deadline)
        chosen = group_list(groups, group_tokens)
        self._host.paths.before_read(self._body.group, self._number(layer))
        return start_groups(source, chosen, group_tokens, self._counting_corruption, deadline)

    def read_groups(
        self, layer: int, groups: Any, group_tokens: int, *, timeout_s: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads groups of tokens of a layer. Blocks on the drive.

        Args:
            layer: As in :meth:`start_groups`.
            groups: Likewise.
            group_tokens: Likewise.
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            K and V in host memory, ``[n, group_tokens, kv_heads, head_dim]`` each, in the order
            asked for.

        Raises:
            CorruptionError: A checksum differs.
            Others: As :meth:`start_groups` and :meth:`GroupReading.finish`.
        """
        deadline = Deadline(timeout_s)
        reading = self.start_groups(layer, groups, group_tokens, timeout_s=deadline.left_s())
        return reading.finish(timeout_s=deadline.left_s())
