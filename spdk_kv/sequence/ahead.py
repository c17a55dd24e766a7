"""What a sequence reads ahead: what its caller asks for, or the order learnt from earlier scans."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from spdk_kv.deadline import NEVER, Busy, Deadline, if_free
from spdk_kv.errors import SpdkKvError
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator, ScanOrder, UnitGroup
from spdk_kv.sequence.layer import Layer


class ReadAhead:
    """Starts reads before they are asked for, as far as ``paths`` admits them. The caller holds no
    lock."""

    def __init__(
        self,
        paths: Orchestrator,
        group: UnitGroup,
        layers: Sequence[Layer],
        max_tokens: int | None,
    ) -> None:
        self.learns = True
        self.gpu: LinkedGpu | None = None
        """Where the last read went, if over a link: what is read ahead goes there."""
        self._paths = paths
        self._group = group
        self._layers = layers
        self._max_tokens = max_tokens
        self._order = ScanOrder()
        # Asked for and not started: (layer, first token, spare tokens).
        self._asked: deque[tuple[int, int, int]] = deque()

    def ask(
        self, layers: Sequence[int], first: int, spare: int, deadline: Deadline = NEVER
    ) -> None:
        """Starts to read ``layers`` in that order, the later ones when there is room. From now on
        the caller is in charge, and nothing is read ahead unasked."""
        self.learns = False
        self._paths.ahead.in_use(self)
        for number in layers:
            layer = self._layers[number]
            with deadline.hold(layer.lock):
                is_empty = first >= layer.tokens
                if is_empty:
                    layer.prefetch(first, 0)  # drops what was prefetched from another token
            if not is_empty:
                self._asked.append((number, first, spare))
        self._start_asked(deadline)

    def after_read(self, layer: int | None, deadline: Deadline = NEVER) -> None:
        """Goes on after a read of all tokens of ``layer`` (None: of some of them).

        Does not raise: if something is wrong with a layer, its own read will say so.
        """
        with suppress(SpdkKvError, MemoryError):
            self._paths.ahead.in_use(self)
            if self._asked:
                self._start_asked(deadline)
            elif self.learns and layer is not None:
                self._order.record(layer)
                for expected in self._order.expected(len(self._layers)):
                    if not self._start(expected, 0, 1, deadline):
                        break

    def clear(self) -> None:
        """Forgets what was asked for and not started."""
        self._asked.clear()

    def give_up(self) -> bool:
        """Drops what was read ahead, and returns whether it was all: layers in use just now keep
        theirs. Does not wait."""
        is_all = True
        for layer in self._layers:
            try:
                with if_free(layer.lock):
                    layer.reader.prefetched.drop()
            except Busy:
                is_all = False
        return is_all

    def _start_asked(self, deadline: Deadline) -> None:
        with suppress(IndexError):  # another thread may take the last one
            while self._asked:
                asked = self._asked.popleft()
                if not self._start(*asked, deadline):
                    self._asked.appendleft(asked)
                    return

    def _start(self, number: int, first: int, spare: int, deadline: Deadline) -> bool:
        """Starts one, if there is room for what it will hold."""
        import torch

        layer = self._layers[number]
        self._paths.before_read_ahead(self._group)
        with deadline.hold(layer.lock), deadline.hold(self._paths.ahead.lock):
            if self._max_tokens is not None:
                spare = min(spare, self._max_tokens - layer.tokens)
            if not self._paths.ahead.admits(layer.reader.prefetch_nbytes(first, spare)):
                return False
            try:
                layer.prefetch(first, spare, self.gpu)
            except torch.cuda.OutOfMemoryError:
                return False
        return True
