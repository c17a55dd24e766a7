"""Replays a decode: real I/O and real memory, but no model.

A :class:`KVPath` is one way to keep a KV cache outside of the GPU: it writes a prompt's K and V
layer by layer, then reads all of it for every token, in its own schedule. What a GPU would do is
slept through (:class:`SimulatedGpu`), which takes no CPU time, as a GPU does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from spdk_kv._native.checksum import crc32c
from spdk_kv.errors import CorruptionError
from spdk_kv.measure.decode.load import Bytes, Load, Noise
from spdk_kv.types import KVShape


class SimulatedGpu:
    """The replay's GPU, whose computing and copies take time and do nothing. Thread-safe.

    Each direction of the link is one queue, like a GPU's copy engine.

    Args:
        compute_s: seconds that it computes per layer.
        link_bytes_s: bytes per second in either direction; None if it uses K and V where they are,
            in host memory.
    """

    def __init__(self, compute_s: float = 0.0, link_bytes_s: float | None = None) -> None:
        self.compute_s = compute_s
        self.link_bytes_s = link_bytes_s
        self._free_at = {"in": 0.0, "out": 0.0}
        self._lock = threading.Lock()

    def copy(self, nbytes: int, direction: str = "in") -> float:
        """Queues a copy of ``nbytes``; returns the ``time.perf_counter()`` at which it ends."""
        now = time.perf_counter()
        if self.link_bytes_s is None:
            return now
        with self._lock:
            begin = max(now, self._free_at[direction])
            end = self._free_at[direction] = begin + nbytes / self.link_bytes_s
        return end

    def compute(self, share: float = 1.0) -> None:
        """Blocks for ``share`` of the time that one layer takes to compute."""
        self.wait(time.perf_counter() + share * self.compute_s)

    @staticmethod
    def wait(until: float) -> None:
        """Blocks until ``time.perf_counter()`` shows ``until``."""
        left = until - time.perf_counter()
        if left > 0:
            time.sleep(left)


class KVPath(Protocol):
    """One way to keep a KV cache outside of the GPU."""

    def prefill(self) -> None:
        """Stores the prompt's K and V of every layer; blocks until they were accepted."""

    def step(self, step: int, see: Callable[[int, Bytes], None] | None) -> None:
        """Decodes one token: reads every unit, computes, appends a row to each unit.

        ``see``, if not None, is called with the number and the bytes of each unit that was read.
        """

    def explain(self) -> dict[str, Any]:
        """What the path reports about itself at the end, for JSON."""

    def close(self) -> None:
        """Releases everything, and removes its files."""


@dataclass(frozen=True)
class Step:
    """One decode step: its duration, and the bytes that it asked for."""

    seconds: float
    read_nbytes: int


class Replay:
    """Runs one path through prompt and decode, and finally checks what it reads."""

    def __init__(self, load: Load, noise: Noise, path: KVPath) -> None:
        self._load = load
        self._noise = noise
        self._path = path
        self._done = 0

    def prefill(self) -> float:
        """Stores the prompt; returns the seconds until it was accepted."""
        began = time.perf_counter()
        self._path.prefill()
        return time.perf_counter() - began

    def step(self) -> Step:
        """Decodes the next token."""
        began = time.perf_counter()
        self._path.step(self._done, None)
        seconds = time.perf_counter() - began
        step = Step(seconds, self._load.step_nbytes(self._done))
        self._done += 1
        return step

    def check(self) -> None:
        """Reads everything in one last decode step, and compares it with what was stored.

        Raises CorruptionError.
        """
        crcs: dict[int, int] = {}

        def see(unit: int, data: Bytes) -> None:
            crcs[unit] = crc32c(data.data)

        self._path.step(self._done, see)
        for unit in range(self._load.units):
            if crcs.get(unit) != self._noise.checksum(unit, self._done):
                raise CorruptionError(
                    f"unit {unit} as read is not what was stored: "
                    + ("it was not read at all" if unit not in crcs else "CRC32C differs")
                )


class StorePath:
    """spdk_kv itself: a temporary sequence, prefetched in the order of the layers.

    Args:
        ahead: layers to prefetch beyond the one in use; 0 for none.
        options: fields of :class:`spdk_kv.PageCacheOptions`, which choose the path.
    """

    def __init__(
        self,
        load: Load,
        noise: Noise,
        gpu: SimulatedGpu,
        location: str,
        options: dict[str, Any],
        ahead: int = 2,
    ) -> None:
        from spdk_kv.store import PageCacheOptions
        from spdk_kv.store import open as open_store

        self._load = load
        self._noise = noise
        self._gpu = gpu
        self._ahead = min(ahead, load.layers - 1)
        # One token more than the load has, for the step that checks.
        shape = KVShape(
            layers=load.layers,
            kv_heads=load.heads,
            head_dim=load.hidden // load.heads,
            dtype="float16",
            max_tokens=load.tokens + 1,
            batch=load.batch,
        )
        room = shape.nbytes + shape.layers * (1 << 20)
        self._store = open_store(
            location,
            capacity=room,
            page_cache=PageCacheOptions(**options),
        )
        self._sequence = self._store.sequence("replay", shape, temporary=True)
        self._sequence.read_ahead = False

    def prefill(self) -> None:
        for layer in range(self._load.layers):
            self._gpu.compute()
            self._append(layer, [self._noise.prompt(2 * layer + side) for side in (0, 1)])
        for layer in range(self._load.layers):
            self._sequence.settle(layer)

    def step(self, step: int, see: Callable[[int, Bytes], None] | None) -> None:
        layers, ahead = self._load.layers, self._ahead
        arrived = 0.0
        for layer in range(layers):
            if ahead:
                # Wraps around at the end, as the next token begins with the first layers.
                self._sequence.prefetch([(layer + n) % layers for n in range(1, ahead + 1)])
            k, v = self._sequence.read(layer)
            computed = arrived
            arrived = self._gpu.copy(2 * k.nbytes)
            if see is not None:
                for side, tensor in enumerate((k, v)):
                    see(2 * layer + side, _rows(tensor))
            del k, v
            # The layer before this one computes while this one is copied.
            if layer:
                self._compute_and_append(layer - 1, step, computed)
        self._compute_and_append(layers - 1, step, arrived)

    def _compute_and_append(self, layer: int, step: int, arrived: float) -> None:
        self._gpu.wait(arrived)
        self._gpu.compute()
        self._append(layer, [self._noise.token(2 * layer + side, step) for side in (0, 1)])

    def _append(self, layer: int, sides: list[Bytes]) -> None:
        import torch

        load = self._load
        shape = (-1, load.batch, load.heads, load.hidden // load.heads)
        self._gpu.wait(self._gpu.copy(sum(side.nbytes for side in sides), "out"))
        k, v = (
            # torch warns of arrays that are read-only; this one is only read.
            torch.from_numpy(side).view(torch.float16).view(shape).permute(1, 2, 0, 3)
            for side in sides
        )
        self._sequence.append(layer, k, v)

    def explain(self) -> dict[str, Any]:
        return {key: self._store.stats().get(key) for key in ("engine", "residency")}

    def close(self) -> None:
        self._store.close()


def _rows(tensor: Any) -> Bytes:
    """``[batch, heads, tokens, head_dim]`` as the rows that were appended."""
    import torch

    found: Bytes = tensor.permute(2, 0, 1, 3).contiguous().view(-1).view(torch.uint8).numpy()
    return found
