"""The asynchronous twins of a sequence's blocking calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from spdk_kv.link import LinkedGpu
from spdk_kv.sequence.host import Host

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Twins(ABC):
    """Calls that return futures of what :meth:`append` and :meth:`read` do."""

    _host: Host

    @abstractmethod
    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, timeout_s: float | None = None
    ) -> None: ...

    @abstractmethod
    def read(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
        timeout_s: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def append_async(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, timeout_s: float | None = None
    ) -> Future[None]:
        """As :meth:`append`, in the background.

        Appends to one layer may overtake each other: wait for one before the next.

        Returns:
            A future of None.
        """
        gpu = self._host.links.of((k, v))
        return self._in_background(gpu, lambda: self.append(layer, k, v, timeout_s=timeout_s))

    def read_async(
        self,
        layer: int,
        *,
        tokens: slice | None = None,
        heads: Iterable[int] | slice | None = None,
        device: Any = None,
        timeout_s: float | None = None,
    ) -> Future[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`read`, in the background.

        Returns:
            A future of K and V.
        """
        gpu = self._gpu(device)
        return self._in_background(
            gpu,
            lambda: self.read(
                layer, tokens=tokens, heads=heads, device=device, timeout_s=timeout_s
            ),
        )

    def _gpu(self, device: Any) -> LinkedGpu | None:
        return None if device is None else self._host.links.gpu(device)

    def _in_background(self, gpu: LinkedGpu | None, work: Callable[[], T]) -> Future[T]:
        """Runs ``work`` on another thread, in order with this one's current stream on ``gpu``."""
        stream: AbstractContextManager[Any] = nullcontext() if gpu is None else gpu.on_this_stream()

        def run() -> T:
            with stream:
                return work()

        return self._host.run_in_background(run)
