"""The replay of the decode measurements: real I/O and real memory, no model.

A :class:`KVPath` is one way to keep a KV cache outside of the GPU: it writes a prompt's K and V
layer by layer, then reads all of it for every token, in its own schedule. A GPU's part is waited
for (:class:`Device`), which costs no CPU time: neither does a GPU.
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


class Device:
    """The GPU of the replay: computes for ``compute_s`` per layer, and takes and gives bytes at
    ``link_bytes_s`` in either direction (None: KV is of use where it lies, in host memory).

    The link is one queue per direction, as a copy engine is. Thread-safe.
    """

    def __init__(self, compute_s: float = 0.0, link_bytes_s: float | None = None) -> None:
        self.compute_s = compute_s
        self.link_bytes_s = link_bytes_s
        self._free_at = {"in": 0.0, "out": 0.0}
        self._lock = threading.Lock()

    def copy(self, nbytes: int, direction: str = "in") -> float:
        """Queues a copy of bytes that are in host memory now; returns when it will have ended (on
        ``time.perf_counter``)."""
        now = time.perf_counter()
        if self.link_bytes_s is None:
            return now
        with self._lock:
            begin = max(now, self._free_at[direction])
            end = self._free_at[direction] = begin + nbytes / self.link_bytes_s
        return end

    def compute(self, share: float = 1.0) -> None:
        """Blocks for ``share`` of one layer's computing."""
        self.wait(time.perf_counter() + share * self.compute_s)

    @staticmethod
    def wait(until: float) -> None:
        """Blocks until ``time.perf_counter()`` shows ``until``."""
        left = until - time.perf_counter()
        if left > 0:
            time.sleep(left)


class KVPath(Protocol):
    """One way to keep a KV cache. ``see(unit, bytes)`` is given each unit read, if not None."""

    def prefill(self) -> None:
        """Stores the prompt's K and V of every layer; blocks until they were taken over."""

    def step(self, step: int, see: Callable[[int, Bytes], None] | None) -> None:
        """One token: reads every unit, computes, stores one more row of each."""

    def explain(self) -> dict[str, Any]:
        """What the path says about itself at the end, for JSON."""

    def close(self) -> None:
        """Gives everything back, its files too."""


@dataclass(frozen=True)
class Moment:
    """One decode step. ``read_nbytes``: bytes the step asked for."""

    seconds: float
    read_nbytes: int


class Replay:
    """Runs one path through prompt and decode, and checks what it read at the end."""

    def __init__(self, load: Load, noise: Noise, path: KVPath) -> None:
        self._load = load
        self._noise = noise
        self._path = path
        self._done = 0

    def prefill(self) -> float:
        """Seconds until the prompt's KV cache was taken over."""
        began = time.perf_counter()
        self._path.prefill()
        return time.perf_counter() - began

    def step(self) -> Moment:
        """The next token."""
        began = time.perf_counter()
        self._path.step(self._done, None)
        seconds = time.perf_counter() - began
        moment = Moment(seconds, self._load.step_nbytes(self._done))
        self._done += 1
        return moment

    def check(self) -> None:
        """Reads everything once more, as a last decode step, and compares it with what was stored.
        CorruptionError."""
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
    """spdk_kv itself: a temporary sequence, read ahead in the order of the layers.

    ``ahead``: layers asked for before they are needed (0: nothing is read ahead). ``options``:
    fields of :class:`spdk_kv.PageCacheOptions`, which choose the path.
    """

    def __init__(
        self,
        load: Load,
        noise: Noise,
        device: Device,
        location: str,
        options: dict[str, Any],
        ahead: int = 2,
    ) -> None:
        from spdk_kv.store import EngineOptions, PageCacheOptions
        from spdk_kv.store import open as open_store

        self._load = load
        self._noise = noise
        self._device = device
        self._ahead = min(ahead, load.layers - 1)
        # One step more than the load has: the check's.
        shape = KVShape(
            layers=load.layers,
            kv_heads=load.heads,
            head_dim=load.hidden // load.heads,
            dtype="float16",
            max_tokens=load.tokens + 1,
            batch=load.batch,
        )
        room = shape.nbytes + shape.layers * (1 << 20)
        # Without reserved hugepages: they count under no limit, and others may take them between a
        # run that measures what the variant needs beside the KV cache, and the next.
        self._store = open_store(
            location,
            capacity=room,
            engine=EngineOptions(hugepages=False),
            page_cache=PageCacheOptions(**options),
        )
        self._sequence = self._store.sequence("replay", shape, temporary=True)
        self._sequence.read_ahead = False

    def prefill(self) -> None:
        for layer in range(self._load.layers):
            self._device.compute()
            self._append(layer, [self._noise.prompt(2 * layer + side) for side in (0, 1)])
        for layer in range(self._load.layers):
            self._sequence.settle(layer)

    def step(self, step: int, see: Callable[[int, Bytes], None] | None) -> None:
        layers, ahead = self._load.layers, self._ahead
        arrived = 0.0
        for layer in range(layers):
            if ahead:
                # Around the end too: the next token begins with the first layers again.
                self._sequence.prefetch([(layer + n) % layers for n in range(1, ahead + 1)])
            k, v = self._sequence.read(layer)
            computed = arrived
            arrived = self._device.copy(2 * k.nbytes)
            if see is not None:
                for side, tensor in enumerate((k, v)):
                    see(2 * layer + side, _rows(tensor))
            del k, v
            # The layer before this one computes while this one is copied.
            if layer:
                self._compute_and_append(layer - 1, step, computed)
        self._compute_and_append(layers - 1, step, arrived)

    def _compute_and_append(self, layer: int, step: int, arrived: float) -> None:
        self._device.wait(arrived)
        self._device.compute()
        self._append(layer, [self._noise.token(2 * layer + side, step) for side in (0, 1)])

    def _append(self, layer: int, sides: list[Bytes]) -> None:
        import torch

        load = self._load
        shape = (-1, load.batch, load.heads, load.hidden // load.heads)
        self._device.wait(self._device.copy(sum(side.nbytes for side in sides), "out"))
        k, v = (
            # Noise is only read.
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
