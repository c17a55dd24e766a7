"""The GPUs that a store's engines reach over links, and tensors' memory on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from spdk_kv._native.transfer import READ, Transfer
from spdk_kv.engines import Engine, Link
from spdk_kv.errors import EngineUnavailable
from spdk_kv.link.cuda import link_for
from spdk_kv.link.pipeline import Pipeline
from spdk_kv.tensors import is_tensor
from spdk_kv.types import torch_dtypes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FindLink = Callable[[Any], tuple[Link | None, str]]


class GpuMemory:
    """Bytes of torch's memory on a GPU, as one tensor.

    ``stream``: the torch stream (or None) on which they were allocated, and with which transfers
    are ordered.
    """

    def __init__(self, tensor: torch.Tensor, stream: Any) -> None:
        self.tensor = tensor
        self.address: int = tensor.data_ptr()
        self.nbytes: int = tensor.nbytes
        self.stream = stream

    def join(self) -> None:
        """From here on torch's current stream waits for whatever the memory's stream waits for."""
        if self.stream is None:
            return
        import torch

        current = torch.cuda.current_stream(self.tensor.device)
        if current != self.stream:
            current.wait_stream(self.stream)
            self.tensor.record_stream(current)


class LinkedGpu:
    """A GPU that ``engines`` reach over ``link``. Thread-safe. :meth:`Links.gpu` makes it.

    Nothing here waits for the GPU: a transfer comes after what was queued on torch's current
    stream, and what is queued after waiting for the transfer comes after it. ``device`` is torch's
    name for it; one without streams (the emulated link's "cpu") is served as well.
    """

    def __init__(self, device: torch.device, link: Link, engines: Iterable[Engine]) -> None:
        self.device = device
        self.link = link
        self.pipelines = {engine: Pipeline(engine, link) for engine in engines}

    def allocate(self, nbytes: int) -> GpuMemory:
        """New memory of ``nbytes``. Raises torch.cuda.OutOfMemoryError."""
        import torch

        tensor = torch.empty(max(1, nbytes), dtype=torch.uint8, device=self.device)
        return GpuMemory(tensor, self.stream())

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
        """A context in which another thread's work is in order with this thread's current
        stream."""
        import torch

        stream = self.stream()
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def transfer(
        self, engine: Engine, op: int, nbytes: int, stream: Any, **options: Any
    ) -> Transfer:
        """An empty transfer for ``nbytes`` in all, in order with a stream of :meth:`stream`.

        Reads are handed over: see :class:`Transfer`, which also has the ``options``.
        """
        return self.pipelines[engine].transfer(
            op,
            nbytes,
            stream=None if stream is None else int(stream.cuda_stream),
            hand_over=op == READ and stream is not None,
            **options,
        )

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a small host tensor on the GPU, made on the current stream and not waited for.
        ``tensor`` may change at once."""
        import torch

        # torch reuses pinned memory only after the copies from it. A buffer of its own is needed
        # even where `tensor` is pinned, since that may change.
        pinned = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda"
        )
        return pinned.copy_(tensor).to(self.device, non_blocking=True)

    def stats(self) -> list[dict[str, Any]]:
        """For each engine's pipeline: see :meth:`Pipeline.stats`."""
        return [
            {"device": str(self.device), "engine": engine.name, **pipeline.stats()}
            for engine, pipeline in self.pipelines.items()
        ]


class Links:
    """The GPUs that ``engines`` reach over links. Thread-safe.

    ``find(device)``: the link to a torch device, or None, and why there is none.
    """

    def __init__(self, engines: Iterable[Engine], find: FindLink = link_for) -> None:
        self._engines = tuple(engines)
        self._find = find
        self._lock = threading.Lock()
        self._gpus: dict[torch.device, LinkedGpu | None] = {}

    def gpu(self, device: Any) -> LinkedGpu | None:
        """The GPU ``device`` (whatever torch.device takes), or None where no link reaches it.

        The first call for a GPU takes some tens of milliseconds.
        """
        import torch

        device = torch.device(device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        with self._lock:
            if device not in self._gpus:
                self._gpus[device] = self._reach(device)
            return self._gpus[device]

    def of(self, tensors: Iterable[Any]) -> LinkedGpu | None:
        """The one GPU that all ``tensors`` are on, if it is reached over a link."""
        found = seen = None
        for tensor in tensors:
            if not is_tensor(tensor):
                return None
            import torch

            if tensor.layout is not torch.strided:
                return None
            device = tensor.device
            if device == seen:
                continue
            seen = device
            gpu = self.gpu(device)
            if gpu is None or found not in (None, gpu):
                return None
            found = gpu
        return found

    def _reach(self, device: torch.device) -> LinkedGpu | None:
        link, why = self._find(device)
        if link is not None:
            try:
                return LinkedGpu(device, link, self._engines)
            except EngineUnavailable as refused:
                why = str(refused)
        if device.type != "cpu":
            log.info("tensors for %s go through host memory: %s", device, why)
        return None

    def stats(self) -> list[dict[str, Any]]:
        """What each pipeline in use chose and reached: ``device``, ``engine``, and what
        :meth:`Pipeline.stats` returns."""
        with self._lock:
            gpus = [gpu for gpu in self._gpus.values() if gpu is not None]
        return [found for gpu in gpus for found in gpu.stats()]
