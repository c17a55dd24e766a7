"""FlexLLMGen's schedule around its disk: what its disk path and the strong variant share.

Four copy threads take K and V of a layer from one queue, each with a relay buffer that stands for
pinned memory. In a decode step, while layer j computes, the cache of j+1 is loaded and that of
j-1 stored, and all of it is waited for before the next layer begins. Attention and MLP count as
layers of their own, so a load overlaps the MLP only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from spdk_kv.measure import Bytes, Load, Noise, SimulatedGpu

THREADS = 4


class Medium(Protocol):
    """How bytes get to the drive and back. Called by several threads, one unit each."""

    def load(self, unit: int, nbytes: int, relay: torch.Tensor, gpu: SimulatedGpu) -> float:
        """The unit's first ``nbytes`` into ``relay``, and on to the GPU; returns when the last
        of them will be there."""

    def store(self, unit: int, offset: int, data: torch.Tensor) -> None:
        """``data`` at byte ``offset`` of the unit."""

    def close(self) -> None:
        """Removes the files."""


class CopyThreads:
    """Jobs that each get a relay buffer; :meth:`join` waits for all of them."""

    def __init__(self, relay_nbytes: int) -> None:
        self._relay_nbytes = relay_nbytes
        self._jobs: queue.Queue[Callable[[torch.Tensor], None] | None] = queue.Queue()
        self._failed: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[torch.Tensor], None]) -> None:
        self._jobs.put(job)

    def join(self) -> None:
        """Blocks until every job has ended; raises what the first failed one raised."""
        self._jobs.join()
        if self._failed:
            raise self._failed[0]

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        relay = torch.empty(self._relay_nbytes, dtype=torch.uint8)
        while (job := self._jobs.get()) is not None:
            try:
                job(relay)
            except BaseException as failed:
                self._failed.append(failed)
            finally:
                self._jobs.task_done()


class ScheduledPath:
    """A KVPath (see decode_replay) of a medium under FlexLLMGen's schedule."""

    def __init__(
        self, load: Load, noise: Noise, gpu: SimulatedGpu, medium: Medium, relay_nbytes: int | None
    ) -> None:
        self._load = load
        self._noise = noise
        self._gpu = gpu
        self._medium = medium
        # A relay holds one unit, the check's step included. By default FlexLLMGen's is 2 GiB, of
        # which no more than that would ever be touched.
        self._threads = CopyThreads(relay_nbytes or (load.tokens + 1) * load.row_nbytes)
        self._see: Callable[[int, Bytes], None] | None = None

    def prefill(self) -> None:
        for layer in range(self._load.layers):
            # Attention; then the MLP, during which its cache is stored.
            self._gpu.compute(0.5)
            for unit in (2 * layer, 2 * layer + 1):
                self._store(unit, 0, self._noise.prompt(unit))
            self._gpu.compute(0.5)
            self._threads.join()

    def step(self, step: int, see: Callable[[int, Bytes], None] | None) -> None:
        self._see = see
        layers, row = self._load.layers, self._load.row_nbytes
        stored = self._load.prompt + step
        # Layer 0 is loaded beside the embedding.
        self._load_layer(0, stored * row)
        self._threads.join()
        for layer in range(layers):
            self._gpu.compute(0.5)  # attention: neither its neighbours have a cache
            if layer + 1 < layers:
                self._load_layer(layer + 1, stored * row)
            for unit in (2 * layer, 2 * layer + 1):
                self._store(unit, stored * row, self._noise.token(unit, step))
            self._gpu.compute(0.5)
            self._threads.join()

    def _load_layer(self, layer: int, nbytes: int) -> None:
        for unit in (2 * layer, 2 * layer + 1):
            self._threads.submit(lambda relay, unit=unit: self._load_unit(unit, nbytes, relay))

    def _load_unit(self, unit: int, nbytes: int, relay: torch.Tensor) -> None:
        arrived = self._medium.load(unit, nbytes, relay[:nbytes], self._gpu)
        self._gpu.wait(arrived)
        if self._see is not None:
            self._see(unit, relay[:nbytes].numpy())

    def _store(self, unit: int, offset: int, data: Bytes) -> None:
        def job(relay: torch.Tensor) -> None:
            # The copy out of the GPU is the link's; without a link the bytes are here already, as
            # FlexLLMGen uses no relay between two places in host memory.
            self._gpu.wait(self._gpu.copy(data.nbytes, "out"))
            self._medium.store(unit, offset, torch.from_numpy(data))

        self._threads.submit(job)

    def explain(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._threads.close()
        self._medium.close()
