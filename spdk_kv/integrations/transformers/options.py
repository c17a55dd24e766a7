"""How a stream of layers is laid out, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

from spdk_kv.errors import CapacityError, SpdkKvError
from spdk_kv.types import Granularity, KVShape
from spdk_kv.units import format_nbytes


@dataclass(frozen=True)
class StreamOptions:
    """How a :class:`LayerStream` is laid out.

    ``windows``: for each layer, how many tokens its attention sees, the newest one included, or
    None for all. ``max_tokens``: the capacity, reserved at once; None lets it grow as tokens come.
    ``resident_layers``: layers whose K/V may be in memory at once.
    ``name``: of a lasting sequence. ``granularity``: of a new one; None is the fastest.
    """

    windows: tuple[int | None, ...]
    max_tokens: int | None
    resident_layers: int
    name: str | None
    granularity: Granularity | None


@dataclass
class StreamCounters:
    """What a stream did. ``prefetch_hits``: reads of a layer that had been prefetched;
    ``read_wait_s``: seconds spent waiting in reads; bytes are those of K and V together."""

    resident_layers_peak: int = 0
    prefetch_hits: int = 0
    prefetch_misses: int = 0
    appended_nbytes: int = 0
    read_nbytes: int = 0
    read_wait_s: float = 0.0


def no_room(room: int, wanted: int) -> CapacityError:
    """The error for more tokens than there is room for."""
    return CapacityError(
        f"the cache has room for {room} tokens per row, not for {wanted}: make it with "
        f"max_tokens={wanted} or more, or without"
    )


def too_large(error: CapacityError, shape: KVShape) -> CapacityError:
    """``error``, for a sequence whose room is reserved at once, and what to do."""
    return CapacityError(
        f"{error}; {shape.max_tokens} tokens of {shape.layers} layers take "
        f"{format_nbytes(shape.nbytes)}: pass a smaller max_tokens=, or none to have room made as "
        "tokens come, or open the store with a larger capacity="
    )


def half_way(layer: int, past: int, before: int, has: int) -> SpdkKvError:
    """The error for a layer that gets tokens after ``past``, where ``before``, which the pass went
    through before it, ``has`` others."""
    return SpdkKvError(
        f"layer {layer} follows {past} tokens, but layer {before} has {has}: an earlier forward "
        "pass ended half-way; crop(0) takes its tokens back, reset() forgets all"
        + ("; cross-attention takes an OffloadedEncoderDecoderCache" if layer == 0 else "")
    )
