"""The states of a cache's layers as one tensor of bytes, and back.

A snapshot is: magic with the version of the format, bytes of the head and their CRC-32, the head
(JSON: whose it is, and the attributes of each layer's states), and the tensors, each at a multiple
of 64 bytes. All little-endian.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spdk_kv.units import align_up

_MAGIC = b"KVSTATE1"
_START = struct.Struct("<8sII")
_ALIGNED = 64

Attributes = Mapping[str, Any]


class Unreadable(Exception):
    """The bytes are no snapshot of this release."""


class NotStorable(Exception):
    """A layer keeps something of a kind that is not known here; says what."""


def encode(whose: str, layers: Sequence[Attributes]) -> torch.Tensor:
    """The snapshot, ``uint8`` in host memory. Copies every tensor once. NotStorable."""
    tensors: list[torch.Tensor] = []
    described = [_described(dict(layer), tensors) for layer in layers]
    head = json.dumps({"whose": whose, "layers": described}).encode()
    start = _START.pack(_MAGIC, len(head), zlib.crc32(head)) + head
    places, end = [], align_up(len(start), _ALIGNED)
    for tensor in tensors:
        places.append(end)
        end = align_up(end + tensor.nbytes, _ALIGNED)
    whole = torch.zeros(end, dtype=torch.uint8)
    whole[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        _view(whole, place, tensor.dtype, tensor.shape, _dense(tensor)).copy_(tensor)
    return whole


def whose(whole: torch.Tensor) -> str:
    """What :func:`encode` was told. Unreadable."""
    return str(_head(whole)[0]["whose"])


def decode(
    whole: torch.Tensor, place_of: Callable[[torch.device], torch.device]
) -> list[dict[str, Any]]:
    """The attributes of each layer. ``place_of``: where that is which was on a device. Copies
    every tensor. Unreadable."""
    head, end = _head(whole)
    try:
        reader = _Reader(whole, end, place_of)
        return [dict(reader.value(layer)) for layer in head["layers"]]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Unreadable(str(error)) from error


def _head(whole: torch.Tensor) -> tuple[Any, int]:
    """The head, and where it ends."""
    if whole.dtype != torch.uint8 or whole.dim() != 1 or len(whole) < _START.size:
        raise Unreadable("not bytes of a snapshot")
    magic, nbytes, crc = _START.unpack(whole[: _START.size].numpy().tobytes())
    packed = whole[_START.size : _START.size + nbytes].numpy().tobytes()
    if magic != _MAGIC or len(packed) != nbytes or zlib.crc32(packed) != crc:
        raise Unreadable("not a snapshot of this release")
    return json.loads(packed), _START.size + nbytes


def _described(value: Any, tensors: list[torch.Tensor]) -> Any:
    """``value`` in JSON; adds its tensors to ``tensors``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        kind, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        return {"tensor": [kind, shape, list(_dense(value)), str(value.device)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, dict):
        pairs = list(value.items())
        return {"dict": [[key, _described(each, tensors)] for key, each in pairs]}
    if isinstance(value, list | tuple):
        name = "list" if isinstance(value, list) else "tuple"
        return {name: [_described(each, tensors) for each in value]}
    raise NotStorable(f"a {type(value).__name__}")


class _Reader:
    """Takes the tensors in the order in which they were described."""

    def __init__(
        self, whole: torch.Tensor, end: int, place_of: Callable[[torch.device], torch.device]
    ) -> None:
        self._whole = whole
        self._end = align_up(end, _ALIGNED)
        self._place_of = place_of

    def value(self, described: Any) -> Any:
        if not isinstance(described, dict):
            return described
        ((kind, what),) = described.items()
        if kind == "tensor":
            return self._tensor(*what)
        if kind == "dict":
            return {key: self.value(each) for key, each in what}
        if kind == "dtype":
            return getattr(torch, what)
        if kind == "device":
            return self._place_of(torch.device(what))
        found = [self.value(each) for each in what]
        return {"list": list, "tuple": tuple}[kind](found)

    def _tensor(self, kind: str, shape: list[int], strides: list[int], device: str) -> torch.Tensor:
        dtype = getattr(torch, kind)
        stored = _view(self._whole, self._end, dtype, shape, strides)
        self._end = align_up(self._end + stored.nbytes, _ALIGNED)
        place = self._place_of(torch.device(device))
        return torch.empty_strided(shape, strides, dtype=dtype, device=place).copy_(stored)


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a copy: those of ``tensor``, where nothing lies between its elements."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def _view(whole: torch.Tensor, place: int, dtype: torch.dtype, shape: Any, strides: Any) -> Any:
    """The tensor that lies at byte ``place`` of ``whole``."""
    count = 1
    for size in shape:
        count *= size
    nbytes = count * dtype.itemsize
    if place + nbytes > len(whole):
        raise ValueError("it ends before its tensors do")
    return whole[place : place + nbytes].view(dtype).as_strided(shape, strides)
