"""Dtypes by name, and the shape of a sequence's KV cache."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from spdk_kv.errors import ShapeMismatch

if TYPE_CHECKING:
    import torch

Granularity = Literal["layer", "head"]


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """Every dtype of the installed torch with whole, unquantised elements, by name."""
    import torch

    # Quantised dtypes carry a scale beside their bytes, and torch cannot view a buffer as the
    # sub-byte ones (bits1x8, int4 ...).
    found: dict[str, torch.dtype] = {}
    for name in sorted(vars(torch)):
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype) or str(dtype) != f"torch.{name}":
            continue
        if name.startswith(("q", "bits")):
            continue
        try:
            torch.frombuffer(bytearray(dtype.itemsize), dtype=dtype)
        except (RuntimeError, ValueError, TypeError):
            continue
        found[name] = dtype
    return found


@lru_cache(maxsize=256)
def dtype_name(dtype: Hashable) -> str:
    """The name under which ``dtype`` (torch, numpy or text) is recorded.

    ShapeMismatch for numpy dtypes that torch does not have (``float128``, strings ...).
    """
    text = str(dtype).removeprefix("torch.")
    if text not in torch_dtypes():
        raise ShapeMismatch(
            f"dtype {dtype!s} cannot be stored; the ones that can are {', '.join(torch_dtypes())}"
        )
    return text


def dtype_itemsize(name: str) -> int:
    """Bytes per element of the dtype called ``name``."""
    return torch_dtypes()[name].itemsize


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` viewed as a dtype of equal element size that torch can copy, which it cannot do
    for every dtype. Lazy values (conjugates) are resolved."""
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg()
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return plain.view(sizes[plain.element_size()])


@dataclass(frozen=True)
class KVShape:
    """The shape of one sequence's KV cache; fixed when the sequence is created.

    Attributes:
        layers: Layers that have a KV cache, as in the model's configuration.
        kv_heads: Key and value heads of a layer (fewer than its attention heads under GQA).
        head_dim: Elements of one head's key or value.
        dtype: A torch or numpy dtype, or its name; kept as the name.
        max_tokens: Capacity in tokens.
        batch: Batch rows, which decode together. Default 1.

    Raises:
        ShapeMismatch: A size is not a positive int, or the dtype cannot be stored.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Any
    max_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        for field in ("layers", "kv_heads", "head_dim", "max_tokens", "batch"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ShapeMismatch(f"KVShape.{field} is a positive int, not {value!r}")
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return dtype_itemsize(self.dtype)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token adds to one unit: batch x kv_heads x head_dim elements."""
        return self.batch * self.kv_heads * self.head_dim * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache when it is full (K and V of all layers)."""
        return 2 * self.layers * self.max_tokens * self.token_nbytes
