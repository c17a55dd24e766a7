"""A digest of a model's weights: what tells two models of one configuration apart."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

log = logging.getLogger(__name__)

# Tensors up to this size are digested whole.
_WHOLE_NBYTES = 64 << 10
# Larger ones by the sums of this many equal parts, and by as many words from all over them.
_PARTS = 64
# Words of each tensor that are looked at to see whether a digest that was made still holds.
_PROBED_WORDS = 16

_WORD_NBYTES = 8


class _Digest(NamedTuple):
    """A digest, and the state of the tensors that it was made of."""

    state: bytes
    value: str


_digests: weakref.WeakKeyDictionary[nn.Module, _Digest] = weakref.WeakKeyDictionary()


class Undigestible(Exception):
    """A tensor's values cannot be read here; the message says why."""


def weights_digest(model: nn.Module, *, static_rope: bool) -> str:
    """A digest of the bits of every weight, adapters and quantised ones included.

    Every byte counts, in 64-bit sums of the parts of each tensor: another value anywhere changes
    it, whatever device the tensor is on. Reads all weights once (about 10 GB/s) and keeps the
    result until a tensor is replaced or changed; a change through ``.data`` is found by samples.

    Args:
        model: The model.
        static_rope: Whether the frequencies of rotary embeddings are always the same; then they
            count as weights.

    Raises:
        Undigestible: A tensor has no values here, as on the meta device.
    """
    named = list(_tensors(model, static_rope))
    state = _state(named)
    found = _digests.get(model)
    if found is None or found.state != state:
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in named:
            digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            digest.update(_bits(tensor))
        found = _digests[model] = _Digest(state, digest.hexdigest())
    return found.value


def _tensors(model: nn.Module, static_rope: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that makes up the weights once, by name; those within quantised ones apart."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        buffers = {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in passing or (static_rope and "inv_freq" in name)
        }
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))  # tied weights are one tensor
            yield from _plain(f"{path}.{name}", tensor)


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        for part in inner:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    elif tensor.is_meta:
        raise Undigestible(f"{name} is on the meta device")
    elif tensor.layout is not torch.strided:
        raise Undigestible(f"{name} has the layout {tensor.layout}")
    else:
        yield name, tensor.detach()
        # bitsandbytes keeps the scales of a quantised weight beside it.
        scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
        if isinstance(scales, torch.Tensor):
            yield from _plain(f"{name}.absmax", scales)


def _bits(tensor: torch.Tensor) -> bytes:
    octets = _octets(tensor)
    if octets.numel() <= _WHOLE_NBYTES:
        return octets.cpu().numpy().tobytes()
    words = _words(octets)
    part = words.numel() // _PARTS
    body, rest = words[: part * _PARTS], words[part * _PARTS :]
    # Sums of integers wrap around, and are the same in any order and on any device.
    sums = body.view(_PARTS, part).sum(1)
    sample = words[:: max(1, words.numel() // _PARTS)]
    tail = octets[words.numel() * _WORD_NBYTES :]
    return torch.cat([sums, rest, sample]).cpu().numpy().tobytes() + tail.cpu().numpy().tobytes()


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor``, in order."""
    try:
        if tensor.is_quantized:
            tensor = tensor.int_repr()
        flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
        if flat.data_ptr() % _WORD_NBYTES or (
            flat.storage_offset() * flat.element_size() % _WORD_NBYTES
        ):
            flat = flat.clone()  # words are read at their alignment only
        return flat.view(torch.uint8)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise Undigestible(f"a tensor of {tensor.dtype} cannot be read: {error}") from error


def _words(octets: torch.Tensor) -> torch.Tensor:
    return octets[: octets.numel() // _WORD_NBYTES * _WORD_NBYTES].view(torch.int64)


def _state(named: list[tuple[str, torch.Tensor]]) -> bytes:
    """What changes when a tensor is replaced, or changed in place.

    The version of a tensor does not count what is done through ``.data``, as merging adapters is:
    so some of the values are part of it.
    """
    state = hashlib.blake2b(digest_size=16)
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in named:
        version = None if tensor.is_inference() else tensor._version
        place = f"{name}\0{tensor.data_ptr()}\0{version}\0{tuple(tensor.shape)}\0{tensor.dtype}\0"
        state.update(place.encode())
        samples.setdefault(tensor.device, []).append(_sample(tensor))
    for sampled in samples.values():
        state.update(torch.cat(sampled).cpu().numpy().tobytes())
    return state.digest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of some elements from all over ``tensor``."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    if not tensor.is_contiguous():
        tensor = tensor[:1].contiguous() if tensor.dim() else tensor
    flat = tensor.view(-1)
    return _octets(flat[:: max(1, flat.numel() // _PROBED_WORDS)])
