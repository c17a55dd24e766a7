"""What a sequence reads ahead: as its caller says, or in the order learnt from the last turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from spdk_kv.errors import SpdkKvError
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator, ScanOrder, UnitGroup
from spdk_kv.sequence.layer import LayerCache


class ReadAhead:
    """Begins reads before they are asked for, as far as ``paths`` admits. Wants no lock held."""

    def __init__(
        self,
        paths: Orchestrator,
        group: UnitGroup,
        layers: Sequence[LayerCache],
        most_tokens: int,
    ) -> None:
        self.learns = True
        # Where the last read went, if over a link: what is read ahead goes there.
        self.device: LinkedGpu | None = None
        self._paths = paths
        self._group = group
        self._layers = layers
        self._most_tokens = most_tokens
        self._order = ScanOrder()
        # Asked for and not begun: (layer, first token, spare tokens).
        self._asked: deque[tuple[int, int, int]] = deque()

    def ask(self, layers: Sequence[int], first: int, spare: int) -> None:
        """Begins ``layers`` in that order, the later ones when there is room. From now on the
        caller is in charge, and nothing is begun unasked."""
        self.learns = False
        for layer in layers:
            cache = self._layers[layer]
            with cache.lock:
                asks_nothing = first >= cache.tokens
                if asks_nothing:
                    cache.prefetch(first, 0)
            if not asks_nothing:
                self._asked.append((layer, first, spare))
        self._begin_asked()

    def was_read(self, layer: int | None) -> None:
        """After a read, of all tokens of ``layer`` (None: of some): goes on.

        Does not raise: what is wrong with a layer, its own read will say.
        """
        with suppress(SpdkKvError, MemoryError):
            if self._asked:
                self._begin_asked()
            elif self.learns and layer is not None:
                self._order.note(layer)
                for expected in self._order.ahead(len(self._layers)):
                    if not self._begin(expected, 0, 1):
                        break

    def clear(self) -> None:
        """Forgets what was asked for and not begun."""
        self._asked.clear()

    def _begin_asked(self) -> None:
        with suppress(IndexError):  # another thread may take the last one
            while self._asked:
                asked = self._asked.popleft()
                if not self._begin(*asked):
                    self._asked.appendleft(asked)
                    return

    def _begin(self, layer: int, first: int, spare: int) -> bool:
        """Begins one, if there is room for what it will hold."""
        import torch

        cache = self._layers[layer]
        self._paths.reads(self._group, None)
        with cache.lock, self._paths.admission:
            spare = min(spare, self._most_tokens - cache.tokens)
            if not self._paths.admits(cache.ahead_nbytes(first, spare)):
                return False
            try:
                cache.prefetch(first, spare, self.device)
            except torch.cuda.OutOfMemoryError:
                return False
        return True
