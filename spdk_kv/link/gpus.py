"""The torch devices that a store's engines reach over links, and tensors' memory on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from spdk_kv._native.transfer import READ, Transfer
from spdk_kv.engines import Engine, Link
from spdk_kv.errors import EngineUnavailable
from spdk_kv.link.pipeline import Pipeline, link_for
from spdk_kv.types import torch_dtypes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FindLink = Callable[[Any], tuple[Link | None, str]]


class DeviceMemory:
    """Bytes of torch's on a device, as one tensor; ``stream`` (a torch stream, or None) is the one
    that they were allocated on, and that transfers are ordered with."""

    def __init__(self, tensor: torch.Tensor, stream: Any) -> None:
        self.tensor = tensor
        self.address: int = tensor.data_ptr()
        self.nbytes: int = tensor.nbytes
        self.stream = stream

    def join(self) -> None:
        """What the memory's stream waits for, torch's current one does from here on."""
        if self.stream is None:
            return
        import torch

        current = torch.cuda.current_stream(self.tensor.device)
        if current != self.stream:
            current.wait_stream(self.stream)
            self.tensor.record_stream(current)


class LinkedDevice:
    """A torch device that ``engines`` reach over ``link``, chunk by chunk. Thread-safe.

    Made by :meth:`Links.device`. A device with streams (a GPU) is never waited for: what was
    queued on torch's current stream comes before a transfer, and what is queued after waiting for
    the transfer comes after it.
    """

    def __init__(self, device: torch.device, link: Link, engines: Iterable[Engine]) -> None:
        self.device = device
        self.link = link
        self.pipelines = {engine: Pipeline(engine, link) for engine in engines}

    def allocate(self, nbytes: int) -> DeviceMemory:
        """New memory of ``nbytes``. Raises torch.cuda.OutOfMemoryError."""
        import torch

        tensor = torch.empty(max(1, nbytes), dtype=torch.uint8, device=self.device)
        return DeviceMemory(tensor, self.stream())

    def empty(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A new tensor. Raises torch.cuda.OutOfMemoryError."""
        import torch

        return torch.empty(shape, dtype=torch_dtypes()[dtype], device=self.device)

    def stream(self) -> Any:
        """torch's current stream there; None where there are none."""
        if self.device.type != "cuda":
            return None
        import torch

        return torch.cuda.current_stream(self.device)

    def on_this_stream(self) -> AbstractContextManager[Any]:
        """For another thread: what it does in this context is in order with the current stream of
        the thread that asked for it."""
        import torch

        stream = self.stream()
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def transfer(
        self, engine: Engine, op: int, nbytes: int, stream: Any, **options: Any
    ) -> Transfer:
        """An empty transfer for ``nbytes`` in all, in order with a stream of :meth:`stream`. Reads
        are handed over: see :class:`Transfer`, and there for ``options``."""
        return self.pipelines[engine].transfer(
            op,
            nbytes,
            stream=None if stream is None else int(stream.cuda_stream),
            hand_over=op == READ and stream is not None,
            **options,
        )

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a small CPU tensor on the device, made on the current stream; does not wait
        for that. ``tensor`` may change at once."""
        import torch

        # torch does not use pinned memory again before the copies from it are over. Its own, even
        # where `tensor` is pinned already: that may change.
        pinned = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda"
        )
        return pinned.copy_(tensor).to(self.device, non_blocking=True)

    def stats(self) -> list[dict[str, Any]]:
        """Of each engine's pipeline: see :meth:`Pipeline.stats`."""
        return [
            {"device": str(self.device), "engine": engine.name, **pipeline.stats()}
            for engine, pipeline in self.pipelines.items()
        ]


class Links:
    """What ``engines`` reach over links. ``find(device)``: the link to a torch device, or None and
    why there is none. Thread-safe."""

    def __init__(self, engines: Iterable[Engine], find: FindLink = link_for) -> None:
        self._engines = tuple(engines)
        self._find = find
        self._lock = threading.Lock()
        self._devices: dict[torch.device, LinkedDevice | None] = {}

    def device(self, device: Any) -> LinkedDevice | None:
        """``device`` (whatever torch.device takes), or None where no link reaches it.

        The first time takes some tens of milliseconds.
        """
        import torch

        device = torch.device(device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        with self._lock:
            if device not in self._devices:
                self._devices[device] = self._reach(device)
            return self._devices[device]

    def of(self, tensors: Iterable[Any]) -> LinkedDevice | None:
        """The one device that all ``tensors`` are on, if it is reached over a link."""
        import torch

        found = None
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                return None
            device = self.device(tensor.device)
            if device is None or found not in (None, device):
                return None
            found = device
        return found

    def _reach(self, device: torch.device) -> LinkedDevice | None:
        link, why = self._find(device)
        if link is not None:
            try:
                return LinkedDevice(device, link, self._engines)
            except EngineUnavailable as refused:
                why = str(refused)
        if device.type != "cpu":
            log.info("tensors for %s go through host memory: %s", device, why)
        return None

    def stats(self) -> list[dict[str, Any]]:
        """What each pipeline in use chose and reached: ``device``, ``engine``, and the rest as
        :meth:`Pipeline.stats` has it."""
        with self._lock:
            devices = [device for device in self._devices.values() if device is not None]
        return [found for device in devices for found in device.stats()]
